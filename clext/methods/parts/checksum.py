"""Checksums of tensors, made on their device: whether values have changed since."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

# Integers as wide as the numbers of a tensor.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BLOCK = 2**20  # so many numbers at a time are widened


@torch.no_grad()
def checksums(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Integers that differ where the bits of the tensors do. Waits for the device once.

    The sum of the bits of each number times an odd factor of its place, modulo 2^64: one number
    that has changed always changes it, and several leave it with a chance of about 2^-64.
    """
    factors: dict[torch.device, Tensor] = {}
    sums = []
    known = list(tensors)
    places = min(_BLOCK, max((2 * entry.numel() for entry in known), default=0))
    for tensor in known:
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits = values.detach().view(_BITS[values.element_size()]).reshape(-1)
        if bits.device not in factors:
            factors[bits.device] = _factors(places, bits.device)
        sums += [
            (block.to(torch.int64) * factors[bits.device][: len(block)]).sum()
            for block in bits.split(_BLOCK)
        ]
    return tuple(torch.stack([entry.to(sums[0].device) for entry in sums]).tolist()) if sums else ()


def _factors(places: int, device: torch.device) -> Tensor:
    """Odd int64 numbers, one for each place in a block, that seem random."""
    mixed = (torch.arange(places, device=device) + 1) * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    return (mixed ^ (mixed >> 32)) | 1
