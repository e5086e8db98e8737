"""Importance estimates, SCP's projections, and how a task's estimate joins the old ones."""

from __future__ import annotations

import torch
from torch import Tensor

from clext.core.lists import TensorList
from clext.ops.reference.arithmetic import as_it_is, total, wide


@torch.no_grad()
def accumulate_square_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * grads^2 to `acc`, which is in the state dtype of `grads`."""
    for sums, grad in zip(acc, grads, strict=True):
        sums.add_(wide(grad).square(), alpha=scale)


@torch.no_grad()
def accumulate_abs_(acc: TensorList, grads: TensorList, scale: float) -> None:
    """Add scale * |grads| to `acc`, which is in the state dtype of `grads`."""
    for sums, grad in zip(acc, grads, strict=True):
        sums.add_(wide(grad).abs(), alpha=scale)


@torch.no_grad()
def sliced_importance_(acc: TensorList, jacobian: TensorList, slices: Tensor, scale: float) -> None:
    """Add scale * sum over l of (sum over k of slices[l, k] * jacobian[i][k])^2 to `acc`.

    `jacobian[i]`: [K, *acc[i].shape] in the dtype of acc[i]; `slices`: [L, K].
    """
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
    for omega, anchor, new, theta in zip(importances, anchors, estimate, params, strict=True):
        omega.copy_(gamma * wide(omega) + new)
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
    terms = []
    for omega, anchor, new, theta in zip(importances, anchors, estimate, params, strict=True):
        old = gamma * wide(omega)
        merged = old + new
        # Where nothing is important yet the anchor is free: it becomes the parameter.
        share = torch.where(merged > 0, new / merged, 1.0)
        delta = wide(theta) - wide(anchor)
        terms.append((old * share * delta.square()).sum())
        omega.copy_(merged)
        anchor.copy_(wide(anchor) + share * delta)
    return total(terms)
