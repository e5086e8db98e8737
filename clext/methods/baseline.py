"""No protection at all: what forgetting looks like."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clext.methods.base import Method

if TYPE_CHECKING:
    from clext.importance.evaluation import Batches


class Baseline(Method):
    """Plain training: the penalty is zero, whatever the strength."""

    name: ClassVar[str] = "baseline"
    default_strength: ClassVar[float] = 0.0
    state_names: tuple[str, ...] = ()
    fused_state: tuple[str, ...] | None = ()

    def penalty(self) -> Tensor:
        """Zero (0-dim)."""
        return torch.zeros((), device=self._state.params[0].device)

    def add_penalty_grad_(self) -> Tensor:
        """Zero (0-dim); no gradient is touched."""
        self._refuse_if_attached("add_penalty_grad_")
        return self.penalty()

    def _end_task(self, dataloader: Batches | None) -> None:
        """Nothing is kept of a task."""
