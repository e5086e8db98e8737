"""What methods without a penalty share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from clext.methods.base import Method

if TYPE_CHECKING:
    from clext.importance.passes import Batches


class Unpenalised(Method):
    """Methods that do not hold the parameters: the penalty is zero, and no parameter has state."""

    default_strength: ClassVar[float] = 0.0
    has_strength: ClassVar[bool] = False
    state_names: tuple[str, ...] = ()
    fused_state: tuple[str, ...] | None = ()

    def penalty(self) -> Tensor:
        """Zero (0-dim)."""
        self._was_used = True
        return torch.zeros((), device=self._state.params[0].device)

    def add_penalty_grad_(self) -> Tensor:
        """Zero (0-dim); no gradient is touched."""
        self._refuse_if_attached("add_penalty_grad_")
        return self.penalty()

    def _end_task(self, dataloader: Batches | None) -> None:
        """Nothing is kept of the parameters."""
