"""ER-ACE: replay with an asymmetric cross entropy (Caccia et al. 2022, arXiv:2104.05025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext.core.inputs import concatenated, rows
from clext.core.likelihood import IGNORED
from clext.methods.rehearsal import Memory

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions


class ERACE(Memory):
    """New examples do not push old classes away (equation 4 of the paper).

        loss = CE(f(x), y; classes of the batch) + strength * CE(f(x'), y'; all active outputs)

    with (x', y') drawn from the memory. From the second task on the outputs that the batch has no
    label of have no part in the first term; in the first task all have. (Released codes mask from
    the first task on, or leave outputs alone that no batch had yet.) The memory takes each batch in
    after its step. Meant for tasks that bring new classes to one head.
    The first term is the plain cross entropy, whatever loss is trained on else.

    Args:
        model: see `Method`.
        strength: weight of the loss on old examples.
        budget: how many examples are kept, each with a label and a random key.
        batch: how many old examples a step draws, None for as many as the batch has.
        seed: of the choice and the drawing.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "er-ace"
    needs_classes: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        budget: int = 2000,
        batch: int | None = None,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(
            model, strength=strength, budget=budget, batch=batch, seed=seed, **supervision
        )
        self._check_gives_outputs()

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401, ARG002
        self._take_in()
        own, count = self.heads.with_start(inputs, labels), rows(inputs)
        old, together = None, inputs
        if len(self._buffer) > 0:
            self._check_as_kept(inputs, own)
            old = self._buffer.sample(self.batch or count)
            together = concatenated([inputs, old[0]])
        logits = self.heads.logits(together)
        narrowed = self.heads.narrow(logits[:count])
        narrowed, labels = self.heads.matched("loss", narrowed, inputs, labels)
        if self.tasks > 0:
            present = torch.zeros(narrowed.shape[1], dtype=torch.bool, device=narrowed.device)
            present[labels[labels != IGNORED]] = True
            narrowed = narrowed.masked_fill(~present, -torch.inf)
        loss = self.heads.likelihood.loss(narrowed, labels)
        if old is not None:
            loss = loss + self.strength * self.heads.known_loss(logits[count:], old[1])
        self._stream(inputs, own)
        return loss
