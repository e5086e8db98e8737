"""Rehearsal: a loss for the task, and one for what was learned before."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext.core.batches import check_alike
from clext.core.checks import choice, count_or_all, integer
from clext.core.inputs import flatten, mapped, taken
from clext.core.likelihood import IGNORED
from clext.core.parameters import device_of
from clext.methods.base import Method
from clext.methods.parts.buffer import ReplayBuffer
from clext.methods.parts.heads import check_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions


class Rehearsal(Method):
    """Methods that learn a task's own loss and, from the second task on, one of the tasks before.

    Args:
        model: see `Method`.
        strength: weight of the loss on what was learned before.
        balance: how the two losses are added in the k-th task, k counted from 1:

            - "sum": current + strength * old;
            - "mean": (current + strength * old) / (1 + strength), where there is an old one;
            - "tasks": current / k + strength * (1 - 1/k) * old, every task so far counts alike (van
              de Ven and Tolias 2018, arXiv:1809.10635).
    """

    default_strength: ClassVar[float] = 1.0
    has_strength: ClassVar[bool] = True
    has_own_loss: ClassVar[bool] = True
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"balance": ("sum", "mean", "tasks")}

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        balance: str = "sum",
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        self.balance = choice(self.name, "balance", balance, Rehearsal.choices["balance"])

    def _balanced(self, current: Tensor, old: Tensor) -> Tensor:
        """The loss of a step: that of the current task and that of the tasks before (0-dim)."""
        if self.balance != "tasks":
            total = current + self.strength * old
            return total / (1 + self.strength) if self.balance == "mean" else total
        share = 1 / (self.tasks + 1)
        return share * current + self.strength * (1 - share) * old

    def _over_tasks(self, losses: Sequence[Tensor]) -> Tensor:
        """One loss of those that examples have in each earlier task (0-dim each).

        Their sum with balance "sum"; else their mean, so that with "tasks" each counts as much as
        the current task.
        """
        stacked = torch.stack(tuple(losses))
        return stacked.sum() if self.balance == "sum" else stacked.mean()


class Memory(Rehearsal):
    """Rehearsal of examples that are kept in a buffer.

    Args:
        model: see `Method`.
        strength: weight of the loss on old examples.
        budget: how many examples are kept.
        batch: how many old examples a step draws, None for as many as the batch has.
        seed: of the choice and the drawing.
        policy: see `ReplayBuffer`; or "stream": as "reservoir", but every batch that `loss` is
            given with gradients on is taken in before the next, so that steps replay the current
            task as well (a closure that an optimizer calls again counts again). Then `consolidate`
            needs no data. Examples that are not finite or have the label -100 are not kept.
        balance: see `Rehearsal`.
    """

    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    capturable: bool = False  # each step draws

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None,
        budget: int,
        batch: int | None,
        seed: int,
        policy: str = "stream",
        balance: str = "sum",
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, balance=balance, **supervision)
        self.budget = integer(self.name, "budget", budget, minimum=1)
        self.policy = policy
        self.needs_first_task = policy == "stream"
        self.batch = count_or_all(self.name, "batch", batch)
        self.seed = integer(self.name, "seed", seed, minimum=0)
        kept = "reservoir" if policy == "stream" else policy
        self._buffer = ReplayBuffer(self.budget, kept, self.seed)
        self._seen: tuple[Inputs, Tensor] | None = None  # of the stream, to be taken in next

    def _check_gives_outputs(self) -> None:
        """ValueError where the user's own function gives losses alone."""
        if self.heads.gives_losses:
            raise ValueError(
                f"{self.name} learns from the outputs themselves, and loss= gives losses alone; "
                "give forward= in its place"
            )

    def _follow_model(self) -> None:
        self._take_in()
        self._buffer.to(device_of(self.model))

    def _take_in(self) -> None:
        """The batch of the last loss, which the step after it has learned."""
        if self._seen is not None:
            (inputs, labels), self._seen = self._seen, None
            if len(labels) > 0:
                self._buffer.follow(inputs, labels)

    def _check_as_kept(self, inputs: Inputs, labels: Tensor) -> None:
        """ValueError unless a batch fits to what is drawn; before it is."""
        (kept, kept_labels), types = self._kept(), self.policy == "stream"
        check_alike(self.name, inputs, kept, "in the memory", types=types)
        check_alike("loss", labels, kept_labels, "in the memory", "labels y", types=types)

    def _kept(self) -> tuple[Inputs, Tensor]:
        """Inputs and labels of all examples in the memory."""
        inputs, labels, _ = self._buffer.rows
        return inputs, labels

    def _stream(self, inputs: Inputs, labels: Tensor) -> None:
        """To be taken in before the next batch, unless this is a look at the loss only."""
        if self.policy != "stream" or not torch.is_grad_enabled():
            return
        check_plain(self.name, inputs)
        if self.heads.processes.groups:
            raise ValueError(
                f"{self.name}: policy='stream' follows the batches of one process, and several "
                "train this model; use replay with another policy, or sync=False for a memory of "
                "each process"
            )
        worth = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        if self.heads.has_classes(labels):
            worth &= labels != IGNORED + self.heads.start
        for entry in flatten(inputs)[0]:
            worth &= entry.detach().isfinite().reshape(len(entry), -1).all(1)
        # Copies: a loader may use the tensors of a batch again for the next one.
        self._seen = taken((mapped(Tensor.detach, inputs), labels), worth.nonzero().flatten())

    def _end_task(self, dataloader: Batches | None) -> None:
        self._take_in()
        if self.policy != "stream":
            examples = self.heads.read_examples(self.name, dataloader, self.tasks)
            self._buffer.add(self.name, examples, self.heads.processes)
        self._follow_model()

    def _save(self) -> dict[str, Any]:
        self._take_in()
        return {"extra": {"memory": self._buffer.state_dict()}}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._seen = None
        self._buffer.load_state_dict(state["extra"]["memory"], device_of(self.model))
