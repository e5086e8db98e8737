"""The quadratic penalty, its gradient, and both at once."""

from __future__ import annotations

import torch
from torch import Tensor

from clext.core.lists import TensorList
from clext.ops.reference.arithmetic import total, wide


def quadratic_penalty(params: TensorList, anchors: TensorList, importances: TensorList) -> Tensor:
    """Sum of importance * (parameter - anchor)^2 (0-dim), differentiable in `params`."""
    terms = [
        (wide(omega) * (wide(theta) - wide(anchor)).square()).sum()
        for theta, anchor, omega in zip(params, anchors, importances, strict=True)
    ]
    return total(terms)


@torch.no_grad()
def quadratic_penalty_backward(
    grad: Tensor, params: TensorList, anchors: TensorList, importances: TensorList
) -> list[Tensor]:
    """2 * grad * importance * (parameter - anchor), in the dtype of `params`."""
    return [
        torch.empty_like(theta).copy_(2 * grad * wide(omega) * (wide(theta) - wide(anchor)))
        for theta, anchor, omega in zip(params, anchors, importances, strict=True)
    ]


@torch.no_grad()
def add_quadratic_penalty_grad_(
    grads: TensorList,
    params: TensorList,
    anchors: TensorList,
    importances: TensorList,
    strength: float,
) -> Tensor:
    """Add the gradient of strength * `quadratic_penalty` to `grads`; returns its value."""
    terms = []
    for grad, theta, anchor, omega in zip(grads, params, anchors, importances, strict=True):
        delta = wide(theta) - wide(anchor)
        weighted = wide(omega) * delta
        terms.append((weighted * delta).sum())
        grad.copy_(wide(grad) + 2 * strength * weighted)
    return strength * total(terms)
