"""Sliced Cramer Preservation (Kolouri et al. 2020, ICLR)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from clext.core.checks import check_memory, count_or_all, integer, unknown_name
from clext.importance import sliced_cramer_importance
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.supervision import SupervisionOptions


class SCP(QuadraticPenalty):
    """Importance: the mean over directions xi of (d (xi . f) / d parameter)^2, f the mean output.

    The directions are uniform on the unit sphere of the outputs, f is the mean over the data.
    Importances of the tasks add up; the anchor is the end of the latest task. Labels are not used;
    all outputs count, those at padded positions too.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        slices: number of directions drawn, or "exact" for the expectation over all of them.
        samples: how many samples f is the mean over, the first that the loader gives; None: all.
        seed: of the draws; the k-th task (from 0) uses seed + k.
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "scp"
    default_strength: ClassVar[float] = 100.0

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        slices: int | str = "exact",
        samples: int | None = None,
        seed: int = 0,
        state_dtype: torch.dtype | str | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, state_dtype=state_dtype, **supervision)
        if isinstance(slices, str):
            if slices != "exact":
                raise unknown_name("slices of scp", slices, ["exact", "a whole number >= 1"])
        else:
            slices = integer(self.name, "slices", slices, minimum=1)
            check_memory(self.name, "slices", slices, slices)  # of one output, at least
        self.slices = slices
        self.samples = count_or_all(self.name, "samples", samples)
        self.seed = integer(self.name, "seed", seed, minimum=0)

    def _end_task(self, dataloader: Batches | None) -> None:
        importance = sliced_cramer_importance(
            self.model,
            self._state.params,
            dataloader,
            slices=self.slices,
            seed=self.seed + self.tasks,
            supervision=self.heads,
            samples=self.samples,
        )
        self._state.plan.consolidate_importance_(importance, 1.0)
