"""The ops of `torch.ops.clext` as typed functions.

Formulas and arguments of each op are those of its namesake in `clext.reference`. Kernels for CPU
and CUDA are compiled in csrc/; torch_library.py adds shapes, autograd and all other devices.
State is float64 for float64 parameters, else float32; `anchors` and `importances` may both be
bfloat16 instead of float32. Bad arguments raise ValueError (TypeError for dtypes, sparse tensors
and what is no tensor) and change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

import clext.ops._extension  # noqa: F401  (loading it defines the ops)
from clext.ops import reference

if TYPE_CHECKING:
    from types import UnionType

    from clext.core.lists import TensorList

_ops: Any = torch.ops.clext


def _call(name: str, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
    op = getattr(_ops, name).default
    try:
        return op(*arguments, **options)
    except (AttributeError, RuntimeError):
        # Torch refuses what is no tensor before the op sees it, in many lines.
        _check_types(op._schema, arguments)
        raise


def _check_types(schema: torch.FunctionSchema, arguments: tuple[Any, ...]) -> None:
    """TypeError for None, a number or the like where `schema` has a tensor or a list of them."""
    for argument, value in zip(schema.arguments, arguments, strict=False):
        where = f"{schema.name.removeprefix('clext::')}: {argument.name}"
        kind = str(argument.type)
        if kind == "Tensor":
            _check_type(where, value, Tensor, "a tensor")
        elif kind == "List[Tensor]":
            _check_type(where, value, Sequence, "a list of tensors")
            for index, entry in enumerate(value):
                _check_type(f"{where}[{index}]", entry, Tensor, "a tensor")
        elif kind == "float":
            _check_type(where, value, Real | Tensor, "a number")


def _check_type(where: str, value: object, valid: type | UnionType, expected: str) -> None:
    if not isinstance(value, valid):
        got = type(value).__name__
        raise TypeError(f"{where} is of type {got}, expected {expected}") from None


def quadratic_penalty(params: TensorList, anchors: TensorList, importances: TensorList) -> Tensor:
    """Sum of importance * (parameter - anchor)^2 (0-dim), differentiable in `params`.

    By backward passes, once or twice. Under the transforms of torch.func (grad, vmap, jvp, ...) and
    forward-mode differentiation, which do not see into a kernel, it is plain torch.
    """
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return reference.quadratic_penalty(params, anchors, importances)
    return cast("Tensor", _call("quadratic_penalty", params, anchors, importances))


def quadratic_penalty_backward(
    grad: Tensor, params: TensorList, anchors: TensorList, importances: TensorList
) -> list[Tensor]:
    """2 * grad * importance * (parameter - anchor), in the dtype of `params`; `grad` is 0-dim."""
    return cast(
        "list[Tensor]", _call("quadratic_penalty_backward", grad, params, anchors, importances)
    )


def add_quadratic_penalty_grad_(
    grads: TensorList,
    params: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
) -> Tensor:
    """Add the gradient of strength * `quadratic_penalty` to `grads`; returns its value."""
    return cast(
        "Tensor",
        _call("add_quadratic_penalty_grad_", grads, params, anchors, importances, strength),
    )


def accumulate_path_integral_(
    path: TensorList, params: TensorList, starts: TensorList, task_grads: TensorList
) -> None:
    """Subtract task gradient * (parameter - start) from `path` (SI)."""
    _call("accumulate_path_integral_", path, params, starts, task_grads)


def riemannian_walk_step_(
    path: TensorList,
    fisher: TensorList,
    params: TensorList,
    starts: TensorList,
    task_grads: TensorList,
    decay: float,
) -> None:
    """`accumulate_path_integral_`, and fisher = decay * fisher + (1 - decay) * task gradient^2."""
    _call("riemannian_walk_step_", path, fisher, params, starts, task_grads, decay)


def accumulate_riemannian_walk_score_(
    task_score: TensorList,
    path: TensorList,
    interval_start: TensorList,
    fisher: TensorList,
    params: TensorList,
    eps: float,
) -> None:
    """Close an interval: task_score += max(0, path) / (fisher * step^2 / 2 + eps) (RWalk)."""
    _call(
        "accumulate_riemannian_walk_score_", task_score, path, interval_start, fisher, params, eps
    )


def accumulate_square_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * grads^2 to `acc`, which is in the state dtype of `grads`."""
    _call("accumulate_square_", acc, grads, scale)


def accumulate_abs_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * |grads| to `acc`, which is in the state dtype of `grads`."""
    _call("accumulate_abs_", acc, grads, scale)


def sliced_importance_(acc: TensorList, jacobian: TensorList, slices: Tensor, scale: float) -> None:
    """Add scale * sum over l of (sum over k of slices[l, k] * jacobian[i][k])^2 to `acc` (SCP).

    `jacobian[i]`: [K, *acc[i].shape] in the dtype of acc[i]; `slices`: [L, K].
    """
    _call("sliced_importance_", acc, jacobian, slices, scale)


def per_sample_sum(features: Tensor, grads: Tensor, *, function: str = "square") -> Tensor:
    """Sum over samples of a function of each entry of features[s, g] @ grads[s, g]^T.

    `function`: "square", "absolute" (its absolute value) or "identity" (the entry itself).
    """
    return cast("Tensor", _call("per_sample_sum", features, grads, function=function))


def gradient_gram(rows: TensorList, grads: TensorList) -> Tensor:
    """Products of all pairs of K past gradients and the current one, summed over all tensors.

    `rows[i]`: [K, *grads[i].shape], the gradients of K past tasks by parameter i, in the state
    dtype of grads[i] (float64 for float64, else float32); K <= 1024. Returns float64
    [K + 1, K + 1] on their device, symmetric: entry (k, l) is <rows[k], rows[l]>, the last row and
    column belong to `grads`. No entry depends on the number of threads, and the rows are read once.
    GEM (Lopez-Paz and Ranzato 2017, arXiv:1706.08840), A-GEM (Chaudhry et al. 2019,
    arXiv:1812.00420).
    """
    return cast("Tensor", _call("gradient_gram", rows, grads))


def project_gradient_(grads: TensorList, rows: TensorList, weights: Tensor) -> None:
    """Add the sum over k of weights[k] * rows[i][k] to grads[i] (GEM, A-GEM).

    `rows[i]`: [K, *grads[i].shape] in the state dtype of grads[i]; `weights`: float64 [K] on their
    device, where it is read: the host does not wait. A row whose weight is zero is not read, and
    where all are zero nothing is; NaN is not zero. The sum is formed in the state dtype.
    """
    _call("project_gradient_", grads, rows, weights)


def consolidate_importance_(
    importances: TensorList,
    anchors: TensorList,
    estimate: TensorList,
    params: TensorList,
    gamma: float,
) -> None:
    """Set importance to gamma * importance + estimate, anchor to the parameter."""
    _call("consolidate_importance_", importances, anchors, estimate, params, gamma)


def consolidate_all_anchors_(
    importances: TensorList,
    anchors: TensorList,
    estimate: TensorList,
    params: TensorList,
    gamma: float,
) -> Tensor:
    """Merge gamma * (A, anchor) with (F, parameter) into one quadratic; returns the constant."""
    return cast(
        "Tensor", _call("consolidate_all_anchors_", importances, anchors, estimate, params, gamma)
    )


def consolidate_path_integral_(
    importances: TensorList,
    anchors: TensorList,
    path: TensorList,
    params: TensorList,
    xi: float,
    *,
    clamp_total: bool = False,
) -> None:
    """Add max(0, path) / (step^2 + xi) to importance; anchor = parameter; path = 0 (SI).

    With `clamp_total`: importance = max(0, importance + path / (step^2 + xi)).
    """
    _call(
        "consolidate_path_integral_",
        importances,
        anchors,
        path,
        params,
        xi,
        clamp_total=clamp_total,
    )


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
    _call(
        "consolidate_riemannian_walk_", importances, anchors, score, task_score, fisher, params, mix
    )
