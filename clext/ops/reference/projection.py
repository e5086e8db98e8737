"""Products of gradients of past tasks with the current one, and the step away from a conflict."""

from __future__ import annotations

import torch
from torch import Tensor

from clext.core.lists import Argument, TensorList, check_lists
from clext.ops.reference.arithmetic import wide

# A matrix of all products has to stay small beside the gradients.
MAX_ROWS = 1024


@torch.no_grad()
def gradient_gram(rows: TensorList, grads: TensorList) -> Tensor:
    """Products of all pairs of K past gradients and the current one, summed over all tensors.

    `rows[i]`: [K, *grads[i].shape] in the state dtype of grads[i]. Returns float64 [K + 1, K + 1],
    symmetric; the last row and column belong to `grads`.
    """
    check_lists(
        "gradient_gram",
        Argument("grads", grads),
        Argument("rows", rows, state=True, rows=True),
    )
    count = rows[0].shape[0] if rows else 0
    for index, entry in enumerate(rows):
        _check_rows("gradient_gram", index, entry, count, "as many as rows[0]")
    if count > MAX_ROWS:
        raise ValueError(f"gradient_gram: rows[0] has {count} rows, expected at most {MAX_ROWS}")
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
    if weights.dim() != 1:
        raise ValueError(
            f"project_gradient_: weights has shape {list(weights.shape)}, expected [rows]"
        )
    if weights.dtype != torch.float64:
        raise TypeError(
            f"project_gradient_: weights has dtype {weights.dtype}, expected torch.float64"
        )
    check_lists(
        "project_gradient_",
        Argument("grads", grads, written=True),
        Argument("rows", rows, state=True, rows=True),
    )
    for index, entry in enumerate(rows):
        _check_rows("project_gradient_", index, entry, weights.shape[0], "the elements of weights")
    if grads and weights.device != grads[0].device:
        raise ValueError(
            f"project_gradient_: weights is on {weights.device}, expected {grads[0].device}"
        )
    for grad, past in zip(grads, rows, strict=True):
        value = wide(grad)
        for weight, row in zip(weights, past, strict=True):
            value = value + torch.where(weight != 0, weight.to(row.dtype) * row, 0.0)
        grad.copy_(value)


def _check_rows(op: str, index: int, entry: Tensor, expected: int, why: str) -> None:
    if entry.shape[0] != expected:
        raise ValueError(
            f"{op}: rows[{index}] has {entry.shape[0]} rows, expected {expected} ({why})"
        )
