"""Products of gradients of past tasks with the current one, and the step away from a conflict."""

from __future__ import annotations

import torch
from torch import Tensor

from clext.core.lists import TensorList
from clext.ops.reference.arithmetic import wide


@torch.no_grad()
def gradient_gram(rows: TensorList, grads: TensorList) -> Tensor:
    """Products of all pairs of K past gradients and the current one, summed over all tensors.

    `rows[i]`: [K, *grads[i].shape] in the state dtype of grads[i]. Returns float64 [K + 1, K + 1],
    symmetric; the last row and column belong to `grads`.
    """
    count = rows[0].shape[0] if rows else 0
    device = grads[0].device if grads else None
    gram = torch.zeros(count + 1, count + 1, dtype=torch.float64, device=device)
    for past, grad in zip(rows, grads, strict=True):
        # In float64, which no matmul precision setting and no autocast touches.
        both = torch.cat([past.double(), grad.double()[None]]).reshape(count + 1, grad.numel())
        gram += both @ both.t()
    return gram.triu() + gram.triu(1).t()


@torch.no_grad()
def project_gradient_(grads: TensorList, rows: TensorList, weights: Tensor) -> None:
    """Add the sum over k of weights[k] * rows[i][k] to grads[i].

    `rows[i]`: [K, *grads[i].shape] in the state dtype of grads[i]; `weights`: float64 [K]. A row
    whose weight is zero does not take part, whatever is in it.
    """
    for grad, past in zip(grads, rows, strict=True):
        value = wide(grad)
        for weight, row in zip(weights, past, strict=True):
            value = value + torch.where(weight != 0, weight.to(row.dtype) * row, 0.0)
        grad.copy_(value)
