"""Importance estimates, SCP's projections, and how a task's estimate joins the old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from clext.core.lists import (
    Argument,
    TensorList,
    check_fraction,
    check_lists,
    check_scalar,
    state,
)
from clext.ops.reference.arithmetic import as_it_is, total, wide


@torch.no_grad()
def accumulate_square_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * grads^2 to `acc`, which is in the state dtype of `grads`."""
    check_scalar("accumulate_square_", "scale", scale)
    check_lists(
        "accumulate_square_",
        state("acc", acc, written=True),
        Argument("grads", grads),
    )
    for sums, grad in zip(acc, grads, strict=True):
        sums.add_(wide(grad).square(), alpha=scale)


@torch.no_grad()
def accumulate_abs_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * |grads| to `acc`, which is in the state dtype of `grads`."""
    check_scalar("accumulate_abs_", "scale", scale)
    check_lists(
        "accumulate_abs_",
        state("acc", acc, written=True),
        Argument("grads", grads),
    )
    for sums, grad in zip(acc, grads, strict=True):
        sums.add_(wide(grad).abs(), alpha=scale)


@torch.no_grad()
def sliced_importance_(acc: TensorList, jacobian: TensorList, slices: Tensor, scale: float) -> None:
    """Add scale * sum over l of (sum over k of slices[l, k] * jacobian[i][k])^2 to `acc`.

    `jacobian[i]`: [K, *acc[i].shape] in the dtype of acc[i]; `slices`: [L, K].
    """
    check_scalar("sliced_importance_", "scale", scale)
    if slices.dim() != 2:
        raise ValueError(
            f"sliced_importance_: slices has shape {list(slices.shape)}, expected [slices, outputs]"
        )
    check_lists(
        "sliced_importance_",
        state("acc", acc, written=True),
        Argument("jacobian", jacobian, state=True, rows=True),
    )
    if len({entry.dtype for entry in acc}) > 1:
        raise ValueError("sliced_importance_: acc mixes float32 and float64, expected one dtype")
    outputs = slices.shape[1]
    for index, rows in enumerate(jacobian):
        if rows.shape[0] != outputs:
            raise ValueError(
                f"sliced_importance_: jacobian[{index}] has {rows.shape[0]} rows, expected "
                f"{outputs} (the columns of slices)"
            )
    for sums, rows in zip(acc, jacobian, strict=True):
        with as_it_is(sums.device):
            for direction in slices.to(sums.dtype):
                sums.add_(torch.tensordot(direction, rows, dims=1).square(), alpha=scale)


@torch.no_grad()
def consolidate_importance_(
    importances: TensorList,
    anchors: TensorList,
    estimate: TensorList,
    params: TensorList,
    gamma: float,
) -> None:
    """Set importance to gamma * importance + estimate, anchor to the parameter."""
    check_fraction("consolidate_importance_", "gamma", gamma)
    check_lists(
        "consolidate_importance_",
        Argument("params", params),
        state("importances", importances, written=True),
        state("anchors", anchors, written=True),
        state("estimate", estimate),
    )
    for omega, anchor, new, theta in zip(importances, anchors, estimate, params, strict=True):
        omega.mul_(gamma).add_(new)
        anchor.copy_(theta)


@torch.no_grad()
def consolidate_all_anchors_(
    importances: TensorList,
    anchors: TensorList,
    estimate: TensorList,
    params: TensorList,
    gamma: float,
) -> Tensor:
    """Merge gamma * (A, anchor) with (F, parameter) into one quadratic; returns the constant.

    The sum of two quadratics is one, of importance A + F around
    (A * anchor + F * parameter) / (A + F), and the constant
    A * F / (A + F) * (parameter - anchor)^2, whose sum is returned (0-dim).
    """
    check_fraction("consolidate_all_anchors_", "gamma", gamma)
    check_lists(
        "consolidate_all_anchors_",
        Argument("params", params),
        state("importances", importances, written=True),
        state("anchors", anchors, written=True),
        state("estimate", estimate),
    )
    terms = []
    for omega, anchor, new, theta in zip(importances, anchors, estimate, params, strict=True):
        old = gamma * omega
        merged = old + new
        # Where nothing is important yet the anchor is free: it becomes the parameter.
        share = torch.where(merged > 0, new / merged, 1.0)
        delta = wide(theta) - anchor
        terms.append((old * share * delta.square()).sum())
        omega.copy_(merged)
        anchor.add_(share * delta)
    return total(terms)
