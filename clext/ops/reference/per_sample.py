"""Sums over samples of a function of each one's gradient, where that is a product of matrices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.ops.reference.arithmetic import as_it_is

if TYPE_CHECKING:
    from collections.abc import Callable

# Bound on the products that are in memory at a time; one sample is always taken.
_CHUNK_BYTES = 256 * 2**20

# What is summed of each entry of a sample's product.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": torch.square,
    "absolute": torch.abs,
    "identity": torch.positive,
}


@torch.no_grad()
def per_sample_sum(features: Tensor, grads: Tensor, *, function: str = "square") -> Tensor:
    """Sum over samples s of (sum over rows r of features[s, g, n, r] * grads[s, g, m, r])^2.

    Of its absolute value if `function` is "absolute", of itself if it is "identity". `features`:
    [samples, groups, *inputs, *rows], with any strides (a view of overlapping windows, say);
    `grads`: [samples, groups, outputs, *rows]; both float32 or float64. Returns [groups, inputs,
    outputs]. Autocast changes nothing; on CUDA, `torch.set_float32_matmul_precision` does.
    """
    groups, inputs, outputs = sums_shape(features, grads)
    samples, rows = len(grads), math.prod(grads.shape[3:])
    sums = grads.new_zeros(groups, inputs, outputs)
    elements = groups * ((inputs + outputs) * rows + 2 * inputs * outputs)
    size = max(1, _CHUNK_BYTES // max(1, elements * grads.element_size()))
    for start in range(0, samples, size):
        count = min(size, samples - start)
        left = features[start : start + count].reshape(count * groups, inputs, rows)
        right = grads[start : start + count].reshape(count * groups, outputs, rows)
        with as_it_is(grads.device):
            products = torch.bmm(left, right.transpose(1, 2)).view(count, *sums.shape)
        sums += FUNCTIONS[function](products).sum(0)
    return sums


def sums_shape(features: Tensor, grads: Tensor) -> tuple[int, int, int]:
    """Groups, inputs and outputs of what `per_sample_sum` returns."""
    at = features.dim() - (grads.dim() - 3)
    return grads.shape[1], math.prod(features.shape[2:at]), grads.shape[2]
