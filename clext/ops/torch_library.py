"""What torch has to know of the ops beside their kernels: shapes, autograd, other devices.

On a device without kernels the functions of `clext.reference` run. Importing this module registers
everything.
"""

from __future__ import annotations

import inspect
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

# In the order of the schemas.
_REFERENCES: dict[str, Callable[..., object]] = {
    function.__name__: function
    for function in (
        reference.quadratic_penalty,
        reference.quadratic_penalty_backward,
        reference.add_quadratic_penalty_grad_,
        reference.accumulate_path_integral_,
        reference.riemannian_walk_step_,
        reference.accumulate_riemannian_walk_score_,
        reference.accumulate_square_,
        reference.accumulate_abs_,
        reference.sliced_importance_,
        reference.per_sample_sum,
        reference.gradient_gram,
        reference.project_gradient_,
        reference.consolidate_importance_,
        reference.consolidate_all_anchors_,
        reference.consolidate_path_integral_,
        reference.consolidate_riemannian_walk_,
        reference.sgd_step_,
        reference.adam_step_,
    )
}


def _on_one_device(name: str, fake: Callable[..., object]) -> Callable[..., object]:
    """`fake`, refusing tensors of several devices: a mix with the meta device arrives here."""
    names = [
        label
        for label, parameter in inspect.signature(_REFERENCES[name]).parameters.items()
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY
    ]

    def checked(*arguments: object, **options: object) -> object:
        expected: torch.device | None = None
        for argument, entries in zip(names, arguments, strict=True):
            for index, entry in enumerate(entries if isinstance(entries, list | tuple) else []):
                expected = expected or entry.device
                if entry.device != expected:
                    raise ValueError(
                        f"{name}: {argument}[{index}] is on {entry.device}, expected {expected} "
                        "(all tensors of one call share a device)"
                    )
        for argument, option in options.items():
            on_host = argument == "lr" and isinstance(option, Tensor) and option.is_cpu
            if isinstance(option, Tensor) and expected not in (None, option.device) and not on_host:
                raise ValueError(
                    f"{name}: {argument} is on {option.device}, expected {expected} "
                    "(the device of params)"
                )
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


def _fake_per_sample_sum(features: Tensor, grads: Tensor, *, function: str = "square") -> Tensor:
    return grads.new_empty(sums_shape(features, grads, function))


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
    "sgd_step_": lambda params, *_others, **_options: _fake_sum(params),
    "adam_step_": lambda params, *_others, **_options: _fake_sum(params),
}


def _register() -> None:
    for name, function in _REFERENCES.items():
        # Any device, and lists without any tensor; the kernels of CPU and CUDA come first.
        _library.impl(name, function, "CompositeExplicitAutograd")
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
        (2 * omega * (wide(theta) - anchor) * wide(direction)).sum()
        for theta, anchor, omega, direction in zip(params, anchors, importances, outer, strict=True)
    ]
    to_params = [
        (2 * grad * omega * wide(direction)).to(direction.dtype)
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
    return (
        list(tensors[:count]),
        list(tensors[count : 2 * count]),
        list(tensors[2 * count :]),
    )


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
