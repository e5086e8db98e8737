"""Experience replay: some examples of the earlier tasks in every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from clext.core.batches import check_alike
from clext.core.checks import count_or_all, integer
from clext.core.inputs import concatenated, rows
from clext.core.parameters import device_of
from clext.methods.parts.buffer import POLICIES, ReplayBuffer
from clext.methods.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from torch import Tensor, nn

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions


class Replay(Rehearsal):
    """Experience replay (Chaudhry et al. 2019, arXiv:1902.10486).

    Some examples of each task are kept. From the second task on, as many of them as the batch has
    are drawn at each step, and their cross entropy is added to that of the batch; both go through
    the model together, so layers that look at the whole batch see old and new examples. The memory
    takes examples of a task in at its end, all in one pass (in the paper: batch by batch as they
    come, in one epoch; what is kept has the same distribution).

    What is kept is bounded by the budget: inputs, a label and a random key for each example. Inputs
    may be several tensors; the loss of a sequence is the mean over its positions that count.

    Args:
        model: see `Method`.
        strength: weight of the loss on old examples.
        budget: how many examples are kept.
        policy: which are kept: "reservoir", every example seen has the same chance (Vitter 1985),
            or "balanced", every class gets the same share of the budget; see `ReplayBuffer`.
        batch: how many old examples a step draws, None for as many as the batch has.
        balance: how the two losses are added: "sum", or "tasks" where the k-th task counts 1/k; see
            `Rehearsal`.
        seed: of the choice and the drawing.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "replay"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {**Rehearsal.choices, "policy": POLICIES}
    capturable: bool = False  # each step draws

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
        super().__init__(model, strength=strength, balance=balance, **supervision)
        self.budget = integer(self.name, "budget", budget, minimum=1)
        self.policy = self._choice("policy", policy)
        self.batch = count_or_all(self.name, "batch", batch)
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self._buffer = ReplayBuffer(self.budget, self.policy, self.seed)

    def _follow_model(self) -> None:
        self._buffer.to(device_of(self.model))

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401
        if len(self._buffer) == 0:
            return super()._loss(inputs, labels, *more)
        count = rows(inputs)
        check_alike(self.name, inputs, self._buffer.rows[0], "in the memory", types=False)
        labels = self.heads.with_start(inputs, labels)
        check_alike("loss", labels, self._buffer.rows[1], "in the memory", "labels y", types=False)
        old, old_labels = self._buffer.sample(self.batch or count, self.heads.processes)
        losses = self.heads.loss_over_tasks(
            concatenated([inputs, old]),
            torch.cat([labels, old_labels]),
            reduction="none",
        )
        return self._balanced(losses[:count].mean(), losses[count:].mean())

    def _end_task(self, dataloader: Batches | None) -> None:
        examples = self.heads.read_examples(self.name, dataloader, self.tasks)
        self._buffer.add(self.name, examples, self.heads.processes)
        self._follow_model()

    def _save(self) -> dict[str, Any]:
        return {"extra": {"memory": self._buffer.state_dict()}}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._buffer.load_state_dict(state["extra"]["memory"], device_of(self.model))
