"""What torch has to know of the ops beside their kernels: shapes, autograd, other devices.

On a device without kernels the functions of `clext.reference` run. Importing this module registers
everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.lists import TensorList, widest
from clext.ops import reference
from clext.ops.kernels import quadratic_penalty_backward
from clext.ops.reference.arithmetic import total, wide
from clext.ops.reference.per_sample import sums_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.autograd.function import BackwardCFunction, FunctionCtx

# Registrations last as long as this object.
_library: Any = torch.library.Library("clext", "IMPL")

# The steps of optimizers are no ops: only a plan takes them.
_NAMES = [name for name in reference.__all__ if name not in ("adam_step_", "sgd_step_")]


def _on_one_device(name: str, fake: Callable[..., object]) -> Callable[..., object]:
    """`fake`, refusing tensors of several devices: a mix with the meta device arrives here."""

    def checked(*arguments: object, **options: object) -> object:
        lists = [entry if isinstance(entry, list | tuple) else [entry] for entry in arguments]
        tensors = [entry for entries in lists for entry in entries if isinstance(entry, Tensor)]
        devices = {str(entry.device) for entry in tensors}
        if len(devices) > 1:
            found = " and ".join(sorted(devices))
            raise ValueError(f"{name}: there are tensors on {found}, expected one device")
        return fake(*arguments, **options)

    return checked


def _fake_sum(tensors: TensorList) -> Tensor:
    if not tensors:
        return torch.empty(())
    return tensors[0].new_empty((), dtype=widest(tensors))


def _fake_gram(rows: TensorList, grads: TensorList) -> Tensor:
    if not rows:
        return torch.empty((1, 1), dtype=torch.float64)
    count = rows[0].shape[0] + 1
    return grads[0].new_empty((count, count), dtype=torch.float64)


def _fake_per_sample_sum(features: Tensor, grads: Tensor, **_options: str) -> Tensor:
    return grads.new_empty(sums_shape(features, grads))


# The only ops with a formula for autograd, at the end of this file.
_DIFFERENTIABLE = ("quadratic_penalty", "quadratic_penalty_backward")

_FAKES: dict[str, Callable[..., object]] = {
    "quadratic_penalty": lambda params, _anchors, _importances: _fake_sum(params),
    "quadratic_penalty_backward": lambda _grad, params, _anchors, _importances: [
        torch.empty_like(entry) for entry in params
    ],
    "add_quadratic_penalty_grad_": lambda _grads, params, *_others: _fake_sum(params),
    "per_sample_sum": _fake_per_sample_sum,
    "gradient_gram": _fake_gram,
    "consolidate_all_anchors_": lambda importances, *_others: _fake_sum(importances),
}


def _register() -> None:
    for name in _NAMES:
        # Any device, and lists without any tensor; the kernels of CPU and CUDA come first.
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        # In-place ops return nothing unless said otherwise.
        fake = _FAKES.get(name, lambda *_arguments, **_options: None)
        torch.library.register_fake(f"clext::{name}", _on_one_device(name, fake), lib=_library)
        if name not in _DIFFERENTIABLE:
            # Not differentiable, though parameters require gradients: nothing is to be recorded.
            _library.impl(name, torch.library.fallthrough_kernel, "Autograd")


# ----------------------------------------------------------------------------- autograd


def _setup_penalty(
    ctx: FunctionCtx,
    inputs: tuple[TensorList, ...],
    output: Tensor,  # noqa: ARG001
) -> None:
    params, anchors, importances = inputs
    _refuse_gradients("quadratic_penalty", anchors, importances)
    ctx.save_for_backward(*params, *anchors, *importances)


def _penalty_backward(
    ctx: BackwardCFunction, grad: Tensor
) -> tuple[list[Tensor], list[None], list[None]]:
    params, anchors, importances = _thirds(ctx.saved_tensors)
    nothing = [None] * len(params)
    return quadratic_penalty_backward(grad, params, anchors, importances), nothing, nothing


def _setup_penalty_backward(
    ctx: FunctionCtx,
    inputs: tuple[Any, ...],
    output: list[Tensor],  # noqa: ARG001
) -> None:
    grad, params, anchors, importances = inputs
    _refuse_gradients("quadratic_penalty_backward", anchors, importances)
    ctx.save_for_backward(grad, *params, *anchors, *importances)


def _penalty_double_backward(
    ctx: BackwardCFunction, outer: list[Tensor]
) -> tuple[Tensor, list[Tensor], list[None], list[None]]:
    """In plain torch, so that it can be differentiated again."""
    saved: tuple[Tensor, ...] = ctx.saved_tensors
    grad, lists = saved[0], saved[1:]
    params, anchors, importances = _thirds(lists)
    to_grad = [
        (2 * wide(omega) * (wide(theta) - wide(anchor)) * wide(direction)).sum()
        for theta, anchor, omega, direction in zip(params, anchors, importances, outer, strict=True)
    ]
    to_params = [
        (2 * grad * wide(omega) * wide(direction)).to(direction.dtype)
        for omega, direction in zip(importances, outer, strict=True)
    ]
    nothing = [None] * len(params)
    return total(to_grad).to(grad.dtype), to_params, nothing, nothing


def _refuse_gradients(op: str, anchors: TensorList, importances: TensorList) -> None:
    for name, tensors in {"anchors": anchors, "importances": importances}.items():
        for index, entry in enumerate(tensors):
            if entry.requires_grad:
                raise ValueError(
                    f"{op}: {name}[{index}] requires grad, expected a constant (the op is "
                    "differentiable in params only); detach() it"
                )


def _thirds(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    count = len(tensors) // 3
    return (list(tensors[:count]), list(tensors[count : 2 * count]), list(tensors[2 * count :]))


_register()
torch.library.register_autograd(
    "clext::quadratic_penalty", _penalty_backward, setup_context=_setup_penalty, lib=_library
)
torch.library.register_autograd(
    "clext::quadratic_penalty_backward",
    _penalty_double_backward,
    setup_context=_setup_penalty_backward,
    lib=_library,
)
