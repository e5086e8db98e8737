"""Arithmetic that the ops in plain torch share: widening, sums and maxima over lists."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core.lists import TensorList, state_dtype, widest

if TYPE_CHECKING:
    from collections.abc import Sequence


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in its state dtype, in which all arithmetic is done."""
    return tensor.to(state_dtype(tensor.dtype))


def as_it_is(device: torch.device) -> AbstractContextManager[object]:
    """Matrix products in the dtype of their arguments, whatever autocast there is around."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def total(terms: Sequence[Tensor]) -> Tensor:
    """Sum of 0-dim tensors (float32, or float64 if any of them is); 0 for none."""
    if not terms:
        return torch.zeros(())
    dtype = widest(terms)
    return torch.stack([term.to(dtype) for term in terms]).sum()


def maximum(tensors: TensorList) -> Tensor:
    """Largest element of all `tensors`, 0-dim; 0 where there is none."""
    filled = [entry for entry in tensors if entry.numel() > 0]
    if not filled:
        return torch.zeros(())
    dtype = widest(filled)
    return torch.stack([entry.max().to(dtype) for entry in filled]).max()
