"""Agreement of the rules with autograd: the gradient of a weighted sum, by both."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core.lists import state_dtype
from clext.importance.rule import add_uses_, identity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from clext.importance.call import Call, Piece

# How far the rules' gradient may be from autograd's, relative to its own terms: above rounding
# (TF32 on GPUs, and some of the layers of torch add up in half precision), below what a hidden use
# changes.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
_TF32_TOLERANCE = 2e-3
_LOW_PRECISION_TOLERANCE = 0.1
_FLOOR = 0.01  # Terms below this share of the largest are compared as if they had it.

_FEW = 16  # samples whose features are copied at once


def rules_agree(
    gradient: Tensor, pieces: Sequence[Piece], arrived: Mapping[Call, Tensor | None]
) -> bool:
    """Whether the rules' gradient is autograd's, `gradient`.

    `arrived`: the gradients by the calls' outputs, None where there is none.
    """
    if gradient.numel() == 0:
        return True
    if not _are_apart(gradient, pieces):
        return False
    tolerance = _TOLERANCE.get(gradient.dtype, _LOW_PRECISION_TOLERANCE)
    if gradient.is_cuda and gradient.dtype == torch.float32:
        tolerance = _TF32_TOLERANCE
    total = _gradient(gradient, pieces, arrived)
    difference = (total - gradient).abs_()

    def is_small_beside(size: Tensor) -> bool:
        allowed = size.clamp_(min=_FLOOR * size.max()).mul_(tolerance)
        return bool((difference <= allowed).all())

    # The terms of a sum are together at least as large as the sum: mostly that is enough.
    return is_small_beside(total.abs_()) or is_small_beside(
        _gradient(gradient, pieces, arrived, of_absolute_terms=True)
    )


def _are_apart(parameter: Tensor, pieces: Sequence[Piece]) -> bool:
    """Whether no entry of the parameter is in two pieces: they would have to be added first."""
    if len(pieces) < 2:
        return True
    count = torch.zeros_like(parameter)
    for piece in pieces:
        count += piece.path.back(parameter.new_ones(piece.path.shape or parameter.shape))
    return bool((count <= 1).all())


def _gradient(
    like: Tensor,
    pieces: Sequence[Piece],
    arrived: Mapping[Call, Tensor | None],
    *,
    of_absolute_terms: bool = False,
) -> Tensor:
    """The gradient by the rules."""
    total = torch.zeros_like(like, dtype=state_dtype(like.dtype))
    for piece in pieces:
        uses = [
            call.use(name, call.rows(g))
            for call, name in piece.uses
            if (g := arrived[call]) is not None
        ]
        if not uses:
            continue
        room = piece.room(total)
        part = total if room is None else room
        if of_absolute_terms:
            for start in range(0, len(uses[0][-1]), _FEW):  # features may be views of less
                few = slice(start, start + _FEW)
                absolute = [
                    (rule, name, features[few].abs(), g[few].abs())
                    for rule, name, features, g in uses
                ]
                add_uses_(part, absolute, identity)
        else:
            add_uses_(part, uses, identity)
        if room is not None:
            total += piece.path.back(room)
    return total
