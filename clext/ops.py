"""The ops of `torch.ops.clext`: typed wrappers, shape functions, autograd, other devices.

Formulas and arguments of each op are those of its namesake in `clext.reference`. Kernels for CPU
and CUDA are compiled in csrc/; on any other device the functions of `clext.reference` run.
Bad arguments raise ValueError (TypeError for dtypes and sparse tensors) and change nothing.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import clext._extension  # noqa: F401  (loading it defines the ops)
from clext import reference
from clext.reference.arithmetic import total, wide
from clext.tensor_lists import TensorList, widest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.autograd.function import BackwardCFunction, FunctionCtx

_ops: Any = torch.ops.clext
# Registrations last as long as this object.
_library: Any = torch.library.Library("clext", "IMPL")


# ----------------------------------------------------------------------------- the ops


def quadratic_penalty(params: TensorList, anchors: TensorList, importances: TensorList) -> Tensor:
    """Sum of importance * (parameter - anchor)^2 (0-dim), differentiable in `params`."""
    return cast("Tensor", _ops.quadratic_penalty.default(params, anchors, importances))


def quadratic_penalty_backward(
    grad: Tensor, params: TensorList, anchors: TensorList, importances: TensorList
) -> list[Tensor]:
    """2 * grad * importance * (parameter - anchor), in the dtype of `params`; `grad` is 0-dim."""
    op = _ops.quadratic_penalty_backward.default
    return cast("list[Tensor]", op(grad, params, anchors, importances))


def add_quadratic_penalty_grad_(
    grads: TensorList,
    params: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
) -> Tensor:
    """Add the gradient of strength * `quadratic_penalty` to `grads`; returns its value."""
    op = _ops.add_quadratic_penalty_grad_.default
    return cast("Tensor", op(grads, params, anchors, importances, strength))


def accumulate_path_integral_(
    path: TensorList,
    previous: TensorList,
    params: TensorList,
    grads: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
) -> None:
    """Subtract task gradient * step from `path`; `previous` becomes the parameters (SI)."""
    _ops.accumulate_path_integral_.default(
        path, previous, params, grads, anchors, importances, strength
    )


def riemannian_walk_step_(
    path: TensorList,
    previous: TensorList,
    fisher: TensorList,
    params: TensorList,
    grads: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
    decay: float,
) -> None:
    """`accumulate_path_integral_`, and fisher = decay * fisher + (1 - decay) * task gradient^2."""
    _ops.riemannian_walk_step_.default(
        path, previous, fisher, params, grads, anchors, importances, strength, decay
    )


def accumulate_riemannian_walk_score_(
    task_score: TensorList,
    path: TensorList,
    interval_start: TensorList,
    fisher: TensorList,
    params: TensorList,
    eps: float,
) -> None:
    """Close an interval: task_score += max(0, path) / (fisher * step^2 / 2 + eps) (RWalk)."""
    _ops.accumulate_riemannian_walk_score_.default(
        task_score, path, interval_start, fisher, params, eps
    )


def accumulate_square_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * grads^2 to `acc`, which is in the state dtype of `grads`."""
    _ops.accumulate_square_.default(acc, grads, scale)


def accumulate_abs_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * |grads| to `acc`, which is in the state dtype of `grads`."""
    _ops.accumulate_abs_.default(acc, grads, scale)


def sliced_importance_(acc: TensorList, jacobian: TensorList, slices: Tensor, scale: float) -> None:
    """Add scale * sum over l of (sum over k of slices[l, k] * jacobian[i][k])^2 to `acc` (SCP).

    `jacobian[i]`: [K, *acc[i].shape] in the dtype of acc[i]; `slices`: [L, K].
    """
    _ops.sliced_importance_.default(acc, jacobian, slices, scale)


def consolidate_importance_(
    importances: TensorList,
    anchors: TensorList,
    estimate: TensorList,
    params: TensorList,
    gamma: float,
) -> None:
    """Set importance to gamma * importance + estimate, anchor to the parameter."""
    _ops.consolidate_importance_.default(importances, anchors, estimate, params, gamma)


def consolidate_all_anchors_(
    importances: TensorList,
    anchors: TensorList,
    estimate: TensorList,
    params: TensorList,
    gamma: float,
) -> Tensor:
    """Merge gamma * (A, anchor) with (F, parameter) into one quadratic; returns the constant."""
    op = _ops.consolidate_all_anchors_.default
    return cast("Tensor", op(importances, anchors, estimate, params, gamma))


def consolidate_path_integral_(
    importances: TensorList,
    anchors: TensorList,
    path: TensorList,
    params: TensorList,
    xi: float,
) -> None:
    """Add max(0, path) / (step^2 + xi) to importance; anchor = parameter; path = 0 (SI)."""
    _ops.consolidate_path_integral_.default(importances, anchors, path, params, xi)


def consolidate_riemannian_walk_(
    importances: TensorList,
    anchors: TensorList,
    score: TensorList,
    task_score: TensorList,
    fisher: TensorList,
    params: TensorList,
    mix: float,
) -> None:
    """Merge the scores; importance = fisher / max(fisher) + score / max(score) (RWalk)."""
    _ops.consolidate_riemannian_walk_.default(
        importances, anchors, score, task_score, fisher, params, mix
    )


def sgd_step_(
    params: TensorList,
    grads: TensorList,
    momentum_buffers: TensorList,
    steps: TensorList,
    path: TensorList,
    fisher: TensorList,
    anchors: TensorList,
    importances: TensorList,
    *,
    lr: Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    strength: float = 0.0,
    decay: float = 0.0,
    proximal: bool = False,
    clear_grad: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One protected step of SGD in one pass; returns the penalty's value before it."""
    return cast(
        "Tensor",
        _ops.sgd_step_.default(
            params,
            grads,
            momentum_buffers,
            steps,
            path,
            fisher,
            anchors,
            importances,
            lr=lr,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            strength=strength,
            decay=decay,
            proximal=proximal,
            clear_grad=clear_grad,
            grad_scale=grad_scale,
            found_inf=found_inf,
        ),
    )


def adam_step_(
    params: TensorList,
    grads: TensorList,
    exp_avgs: TensorList,
    exp_avg_sqs: TensorList,
    steps: TensorList,
    path: TensorList,
    fisher: TensorList,
    anchors: TensorList,
    importances: TensorList,
    *,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    strength: float = 0.0,
    decay: float = 0.0,
    proximal: bool = False,
    clear_grad: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """One protected step of Adam (AdamW if `decoupled`) in one pass; returns as `sgd_step_`."""
    return cast(
        "Tensor",
        _ops.adam_step_.default(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            steps,
            path,
            fisher,
            anchors,
            importances,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
            maximize=maximize,
            strength=strength,
            decay=decay,
            proximal=proximal,
            clear_grad=clear_grad,
            grad_scale=grad_scale,
            found_inf=found_inf,
        ),
    )


# ---------------------------------------------------- registration: one table, in schema order

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


_FAKES: dict[str, Callable[..., object]] = {
    "quadratic_penalty": lambda params, _anchors, _importances: _fake_sum(params),
    "quadratic_penalty_backward": lambda _grad, params, _anchors, _importances: [
        torch.empty_like(entry) for entry in params
    ],
    "add_quadratic_penalty_grad_": lambda _grads, params, *_others: _fake_sum(params),
    "consolidate_all_anchors_": lambda importances, *_others: _fake_sum(importances),
    "sgd_step_": lambda params, *_others, **_options: _fake_sum(params),
    "adam_step_": lambda params, *_others, **_options: _fake_sum(params),
}


def _register() -> None:
    for name, function in _REFERENCES.items():
        # Any device, and lists without any tensor; the kernels of CPU and CUDA come first.
        _library.impl(name, function, "CompositeExplicitAutograd")
        # In-place ops return nothing unless said otherwise.
        fake = _FAKES.get(name, lambda *_arguments: None)
        torch.library.register_fake(f"clext::{name}", _on_one_device(name, fake), lib=_library)
        if name.endswith("_"):
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
