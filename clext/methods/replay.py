"""Experience replay: some examples of the earlier tasks in every batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch

from clext.core.checks import integer
from clext.methods.parts.batch import labelled
from clext.methods.parts.buffer import POLICIES, Memory
from clext.methods.parts.examples import read_examples
from clext.methods.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from clext.importance.passes import Batches
    from clext.methods.learning import Examples
    from clext.methods.stateful import Commit


class Replay(Rehearsal):
    """Experience replay (Chaudhry et al. 2019, arXiv:1902.10486).

    Some examples of each task are kept. From the second task on, as many of them as the batch has
    are drawn at each step, and their cross entropy is added to that of the batch; both go through
    the model together, so layers that look at the whole batch see old and new examples. The memory
    takes examples of a task in at its end, all in one pass (in the paper: batch by batch as they
    come, in one epoch; what is kept has the same distribution).

    What is kept is bounded by the budget: inputs, a label and a random key for each example.

    Args:
        model: see `Method`.
        strength: weight of the loss on old examples.
        budget: how many examples are kept.
        policy: which are kept: "reservoir", every example seen has the same chance (Vitter 1985),
            or "balanced", every class gets the same share of the budget; see `Memory`.
        batch: how many old examples a step draws, None for as many as the batch has.
        balance: how the two losses are added: "sum", or "tasks" where the k-th task counts 1/k; see
            `Rehearsal`.
        seed: of the choice and the drawing, which happen on the model's device.

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "replay"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {**Rehearsal.choices, "policy": POLICIES}
    memory: ClassVar[dict[str, str]] = {"examples": "B*(4*X+16)"}
    recordable = False  # each step draws

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
    ) -> None:
        super().__init__(model, strength=strength, balance=balance)
        self.batch = None if batch is None else integer(self.name, "batch", batch, minimum=1)
        self._memory = Memory(self.name, budget, policy, seed)
        self.budget, self.policy = self._memory.budget, self._memory.policy
        self.seed = self._memory.seed

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if examples is not None:
            self._memory.check_shape(examples[0])
        return examples

    def _loss(self, *batch: Tensor) -> Tensor:
        inputs, labels = labelled(self.name, batch)
        if self._memory.size == 0:
            return super()._loss(inputs, labels)
        self._memory.check_shape(inputs)
        with self._memory.unless_it_fails():
            old, old_labels = self._memory.sample(self.batch or len(inputs))
            losses = self.outputs.cross_entropy(
                torch.cat([inputs, old]),
                torch.cat([labels + self.outputs.start, old_labels]),
                reduction="none",
            )
        return self._balanced(losses[: len(inputs)].mean(), losses[len(inputs) :].mean())

    def _prepare_end(self, dataloader: Batches | None) -> Commit:
        return self._memory.prepare(read_examples(self, dataloader))

    def _extra_state(self) -> dict[str, Any]:
        return {"memory": self._memory.state_dict()}

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        if set(extra) != {"memory"}:
            raise ValueError(
                f"{self.name}: state_dict['extra'] holds {', '.join(extra) or 'nothing'}, expected "
                "memory"
            )
        return self._memory.prepare_load(extra["memory"], self._state.params[0].device)

    def _move_extra_state(self, device: torch.device) -> None:
        self._memory.move(device)
