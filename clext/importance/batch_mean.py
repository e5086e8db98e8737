"""Sums over batches of the squared, or absolute, gradient of a batch's mean: one backward each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from clext import ops
from clext.core.inputs import mapped, rows
from clext.core.parameters import allocate_state
from clext.importance.passes import check_finite, gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.core.inputs import Inputs
    from clext.importance.passes import Forward
    from clext.importance.per_sample import Cotangents


class BatchMeanSum:
    """Like PerSampleSum, but all samples of a batch count with the gradient of their mean.

    Gradients of different samples cancel in a mean, so the sums fall with the batch size.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,  # noqa: ARG002  (as PerSampleSum)
        params: Sequence[Tensor],
        forward: Forward,
        *,
        absolute: bool,
    ) -> None:
        self._owner, self._params, self._forward = owner, params, forward
        self._accumulate = ops.accumulate_abs_ if absolute else ops.accumulate_square_
        self.sums = allocate_state(params)

    def add(self, x: Inputs, cotangents: Cotangents) -> None:
        """Add the samples of one batch."""
        count = rows(x)
        outputs = check_finite(self._owner, self._forward(mapped(Tensor.clone, x)))
        for cotangent in cotangents(outputs.detach()):
            found = gradients(outputs, self._params, cotangent / count)
            self._accumulate([self.sums[i] for i in found], list(found.values()), float(count))
