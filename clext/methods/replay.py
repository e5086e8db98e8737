"""Experience replay: some examples of the earlier tasks in every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from clext.core.inputs import concatenated, rows
from clext.methods.parts.buffer import POLICIES
from clext.methods.rehearsal import Memory, Rehearsal

if TYPE_CHECKING:
    from typing import Unpack

    from torch import Tensor, nn

    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions


class Replay(Memory):
    """Experience replay (Chaudhry et al. 2019, arXiv:1902.10486).

    Some examples of each task are kept. From the second task on, as many of them as the batch has
    are drawn at each step, and their cross entropy is added to that of the batch; both go through
    the model together, so layers that look at the whole batch see old and new examples. The memory
    takes examples of a task in at its end, all in one pass, or step by step (policy="stream").

    What is kept is bounded by the budget: inputs, a label and a random key for each example. Inputs
    may be several tensors; the loss of a sequence is the mean over its positions that count.

    Args:
        model: see `Method`.
        strength: weight of the loss on old examples.
        budget: how many examples are kept.
        policy: which are kept: "reservoir", every example seen has the same chance (Vitter 1985),
            or "balanced", every class gets the same share of the budget; see `ReplayBuffer`. Or
            "stream": as "reservoir", but each batch is taken in after its step, as in the paper, so
            that the current task is replayed too.
        batch: how many old examples a step draws, None for as many as the batch has.
        balance: how the two losses are added: "sum", "mean", or "tasks" where the k-th task counts
            1/k; see `Rehearsal`.
        seed: of the choice and the drawing.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "replay"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **Rehearsal.choices,
        "policy": (*POLICIES, "stream"),
    }

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        budget: int = 2000,
        policy: str = "reservoir",
        batch: int | None = None,
        balance: str = "sum",
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        policy = self._choice("policy", policy)
        memory: Any = {"budget": budget, "policy": policy, "batch": batch, "seed": seed}
        super().__init__(model, strength=strength, balance=balance, **memory, **supervision)

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401
        self._take_in()
        own = self.heads.with_start(inputs, labels)
        if len(self._buffer) == 0:
            loss = super()._loss(inputs, labels, *more)
            self._stream(inputs, own)
            return loss
        count = rows(inputs)
        self._check_as_kept(inputs, own)
        old, old_labels = self._buffer.sample(self.batch or count, self.heads.processes)
        losses = self.heads.loss_over_tasks(
            concatenated([inputs, old]),
            torch.cat([own, old_labels]),
            reduction="none",
        )
        self._stream(inputs, own)
        return self._balanced(losses[:count].mean(), losses[count:].mean())
