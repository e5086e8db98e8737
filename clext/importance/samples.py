"""Which rows of a layer's tensors belong to which sample of the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# All groups of samples but one are probed, by a backward pass each. Of two samples that changed
# places, that shows the one whose group is probed, unless the other is in the same.
_GROUPS = 3
_SEED = 0


@dataclass(frozen=True)
class Layout:
    """Leading dimension `dim` counts the samples, each with several neighbours if `major`.

    Of a dimension of size samples * k, sample n has the entries n * k to n * k + k - 1 if `major`,
    else n, n + samples, n + 2 * samples, ... All other leading dimensions belong to each sample.
    """

    dim: int
    major: bool

    def rows(self, tensor: Tensor, row_dims: int, samples: int) -> Tensor:
        """`tensor` [..., *row] as [samples, rows, *row]."""
        leading = tensor.dim() - row_dims
        shape = (samples, math.prod(tensor.shape[:leading]) // samples, *tensor.shape[leading:])
        if samples == 1:
            return tensor.reshape(shape)
        each = tensor.shape[self.dim] // samples
        if self.major:
            tensor = tensor.unflatten(self.dim, (samples, each)).movedim(self.dim, 0)
        else:
            tensor = tensor.unflatten(self.dim, (each, samples)).movedim(self.dim + 1, 0)
        return tensor.reshape(shape)


def possible_layouts(leading_shape: Sequence[int], samples: int) -> tuple[Layout, ...]:
    """Those that the sizes allow."""
    if samples == 1:
        return (Layout(0, True),)  # everything is the one sample's
    found = []
    for dim, size in enumerate(leading_shape):
        if size > 0 and size % samples == 0:
            found.append(Layout(dim, True))
            if size > samples:
                found.append(Layout(dim, False))
    return tuple(found)


def random_weights(outputs: Tensor) -> Tensor:
    """For a probe: a gradient must not vanish by chance."""
    draws = torch.Generator().manual_seed(_SEED)
    return torch.randn(outputs.shape, generator=draws).to(outputs.device, outputs.dtype)


def groups(samples: int, device: torch.device) -> Iterator[Tensor]:
    """Groups of the samples to probe, drawn at random, as masks [samples].

    There are two, which have no sample in common, and with more than two samples some are in
    neither. A single sample has none.
    """
    if samples == 1:
        return
    draws = torch.Generator().manual_seed(_SEED)
    group = torch.randperm(samples, generator=draws).to(device) % _GROUPS
    for k in range(_GROUPS - 1):
        yield group == k


def fits(g: Tensor, layout: Layout, row_dims: int, chosen: Tensor) -> bool:
    """Whether only the `chosen` samples have a gradient in `g`, which is exact under the layout."""
    others = layout.rows(g, row_dims, len(chosen))[~chosen]
    return not bool(others.any())
