"""Rehearsal: a loss for the task, and one for what was learned before."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from clext.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Unpack

    from torch import Tensor, nn

    from clext.core.supervision import SupervisionOptions


class Rehearsal(Method):
    """Methods that learn a task's own loss and, from the second task on, one of the tasks before.

    Args:
        model: see `Method`.
        strength: weight of the loss on what was learned before.
        balance: how the two losses are added in the k-th task, k counted from 1:

            - "sum": current + strength * old;
            - "tasks": current / k + strength * (1 - 1/k) * old, every task so far counts alike (van
              de Ven and Tolias 2018, arXiv:1809.10635).
    """

    default_strength: ClassVar[float] = 1.0
    has_strength: ClassVar[bool] = True
    has_own_loss: ClassVar[bool] = True
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"balance": ("sum", "tasks")}

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        balance: str = "sum",
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        self.balance = self._choice("balance", balance)

    def _balanced(self, current: Tensor, old: Tensor) -> Tensor:
        """The loss of a step: that of the current task and that of the tasks before (0-dim)."""
        if self.balance == "sum":
            return current + self.strength * old
        share = 1 / (self.tasks + 1)
        return share * current + self.strength * (1 - share) * old

    def _over_tasks(self, losses: Sequence[Tensor]) -> Tensor:
        """One loss of those that examples have in each earlier task (0-dim each).

        Their sum with balance "sum"; with "tasks" their mean, so that each counts as much as the
        current task.
        """
        stacked = torch.stack(tuple(losses))
        return stacked.sum() if self.balance == "sum" else stacked.mean()
