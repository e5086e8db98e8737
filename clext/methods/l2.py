"""L2: a pull to the weights after the last task, all of which count alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from clext.core.batches import Batches


class L2(QuadraticPenalty):
    """Importance 1 for every parameter: what the other regularisers should beat.

    After each task the anchor is where the parameters are; importance does not grow with the tasks.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "l2"
    default_strength: ClassVar[float] = 0.01

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        ones = [torch.ones_like(entry) for entry in self._state.lists["importance"]]
        self._state.plan.consolidate_importance_(ones, 0.0)
