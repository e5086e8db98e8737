"""Memory Aware Synapses (Aljundi et al. 2018, arXiv:1711.09601)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from clext.core.checks import count_or_all, number
from clext.importance import MAS_ESTIMATORS, output_sensitivity
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.supervision import SupervisionOptions


class MAS(QuadraticPenalty):
    """Importance: how much the outputs react, mean over samples of |d ||f(x)||^2 / d parameter|.

    After a task with sensitivity S, importance = gamma * importance + S; the anchor is the end of
    the latest task. Labels are not used; all outputs count, those at padded positions too.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        gamma: what is left of the old importance after each task, in [0, 1]: with 1 the tasks add
            up, as in the paper; with 0 only the latest task counts.
        samples: how many samples it is measured on, the first that the loader gives; None: all.
        estimator: gradients "per_sample", or of the mean of a "batch"; see
            `clext.importance.output_sensitivity`.
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "mas"
    default_strength: ClassVar[float] = 0.05
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"estimator": MAS_ESTIMATORS}

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        gamma: float = 1.0,
        estimator: str = "per_sample",
        samples: int | None = None,
        state_dtype: torch.dtype | str | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, state_dtype=state_dtype, **supervision)
        self.gamma = number(self.name, "gamma", gamma, minimum=0.0, maximum=1.0)
        self.estimator = self._choice("estimator", estimator)
        self.samples = count_or_all(self.name, "samples", samples)

    def _end_task(self, dataloader: Batches | None) -> None:
        sensitivity = output_sensitivity(
            self.model,
            self._state.params,
            dataloader,
            estimator=self.estimator,
            supervision=self.heads,
            samples=self.samples,
        )
        self._state.plan.consolidate_importance_(sensitivity, self.gamma)
