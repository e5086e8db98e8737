"""Memory Aware Synapses (Aljundi et al. 2018, arXiv:1711.09601)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from clext.core.checks import number
from clext.importance import MAS_ESTIMATORS, output_sensitivity
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from clext.core.batches import Batches


class MAS(QuadraticPenalty):
    """Importance: how much the outputs react, mean over samples of |d ||f(x)||^2 / d parameter|.

    After a task with sensitivity S, importance = gamma * importance + S; the anchor is the end of
    the latest task. Labels are not used.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        gamma: what is left of the old importance after each task, in [0, 1]: with 1 the tasks add
            up, as in the paper; with 0 only the latest task counts.
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
        state_dtype: torch.dtype | str | None = None,
    ) -> None:
        super().__init__(model, strength=strength, state_dtype=state_dtype)
        self.gamma = number(self.name, "gamma", gamma, minimum=0.0, maximum=1.0)
        self.estimator = self._choice("estimator", estimator)

    def _end_task(self, dataloader: Batches | None) -> None:
        sensitivity = output_sensitivity(
            self.model,
            self._state.params,
            dataloader,
            estimator=self.estimator,
            forward=self.heads,
        )
        self._state.plan.consolidate_importance_(sensitivity, self.gamma)
