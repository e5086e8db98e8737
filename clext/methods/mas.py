"""Memory Aware Synapses (Aljundi et al. 2018, arXiv:1711.09601)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from clext.importance import MAS_ESTIMATORS, output_sensitivity
from clext.methods.base import Method
from clext.options import choice

if TYPE_CHECKING:
    from clext.importance.evaluation import Batches


class MAS(Method):
    """Importance: how much the outputs react, mean over samples of |d ||f(x)||^2 / d parameter|.

    Importances of the tasks add up; the anchor is the end of the latest task. Labels are not used.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        estimator: "per_sample" or "batch"; see `clext.importance.output_sensitivity`.
    """

    name: ClassVar[str] = "mas"
    default_strength: ClassVar[float] = 0.05
    fused_state: ClassVar[tuple[str, ...] | None] = ("anchor", "importance")

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        estimator: str = "per_sample",
    ) -> None:
        super().__init__(model, strength=strength)
        self.estimator = choice(self.name, "estimator", estimator, MAS_ESTIMATORS)

    def _end_task(self, dataloader: Batches | None) -> None:
        sensitivity = output_sensitivity(
            self.model, self._state.params, dataloader, estimator=self.estimator
        )
        self._state.plan.consolidate_importance_(sensitivity, 1.0)
