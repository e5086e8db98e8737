"""Lists of tensors: the dtypes they may have, and how the entries lie in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

TensorList = Sequence[Tensor]

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of importance, anchor and path of a parameter: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Dtype of a reduction over all `tensors`: float64 if any of them is float64, else float32."""
    wide = any(entry.dtype == torch.float64 for entry in tensors)
    return torch.float64 if wide else torch.float32


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a strided tensor fill one block of memory, each exactly once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue  # the stride of a dimension of one element is never used
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(sizes: Sequence[int], strides: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether an index means the same place in memory with either strides."""
    return all(
        size <= 1 or stride == other
        for size, stride, other in zip(sizes, strides, expected, strict=True)
    )
