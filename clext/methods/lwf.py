"""Learning without Forgetting (Li and Hoiem 2016, arXiv:1606.09282)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F

from clext.core.checks import softening
from clext.methods.parts.batch import added_logits
from clext.methods.parts.distillation import SCALES, distillation_loss, old_heads
from clext.methods.parts.teacher import Snapshot, refuse_broken
from clext.methods.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, device, nn

    from clext.importance.passes import Batches
    from clext.methods.learning import Examples
    from clext.methods.stateful import Commit


class LwF(Rehearsal):
    """The model as it was before the task says what its old outputs are for the new examples.

    The loss on what was learned before is the distillation loss on the inputs of the current task

        T^2 * mean over examples of -sum_c p_c log q_c,

    p = softmax(logits of the model as it was / T), q = softmax(logits / T), over the outputs that
    compete: with a head for each task there is one such loss for each earlier task, over its own
    outputs, and they are summed (balance "sum", as in the paper) or averaged ("tasks"); with one
    growing head q is over all classes seen, and p is zero for the new ones; with one head for all
    tasks both are over all outputs (van de Ven and Tolias 2018, arXiv:1809.10635).

    `begin_task` with the task's examples adds the old logits of all of them, so that the old model
    runs once and not in each step; a loop that does not give it them, or that changes the inputs
    from step to step, has it run in each step. Memory: one copy of the model, however many tasks,
    and during a task, in its examples, 4 bytes for each example and output.

    Args:
        model: see `Method`.
        strength: weight of the distillation loss.
        balance: how the two losses are added: "sum", or "tasks" where the k-th task counts 1/k; see
            `Rehearsal`.
        temperature: T, which softens the probabilities, from 1e-4 to 1e4.
        scale: of the distillation loss: "squared" for the factor T^2, "mean" for that divided by
            the number of outputs that compete, "none" for none. With T^2 gradients do not shrink as
            T grows (Hinton et al. 2015, arXiv:1503.02531); a mean over examples and outputs made
            the published numbers of van de Ven and Tolias.
    """

    name: ClassVar[str] = "lwf"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {**Rehearsal.choices, "scale": SCALES}
    memory: ClassVar[dict[str, str]] = {"teacher": "4*(P + Q)"}

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        balance: str = "sum",
        temperature: float = 2.0,
        scale: str = "squared",
    ) -> None:
        super().__init__(model, strength=strength, balance=balance)
        self.temperature = softening(self.name, temperature)
        self.scale = self._choice("scale", scale)
        self._teacher: Snapshot | None = None  # the model at the end of the last task

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if self._teacher is None or examples is None:
            return examples
        with self.outputs.full():
            return (*examples, self._teacher.record(examples[0]))

    def _loss(self, *batch: Tensor) -> Tensor:
        """With the teacher's logits for all outputs, [N, outputs], as third argument or without."""
        if self._teacher is None:
            return super()._loss(*batch)
        inputs, labels = batch[:2]
        recorded = added_logits(self.name, batch)
        with self.outputs.full():
            logits = self.outputs.logits(inputs, labels)
            teacher = self._teacher(inputs) if recorded is None else recorded
        self.outputs.check_width(self.name, logits.shape[1], teacher.shape[1])
        active = self.outputs.active
        own = logits if active is None else logits[:, active.start : active.stop]
        losses = [
            distillation_loss(logits[:, now], teacher[:, then], self.temperature, self.scale)
            for now, then in old_heads(self.outputs, self.tasks, teacher.shape[1])
        ]
        return self._balanced(F.cross_entropy(own, labels), self._over_tasks(losses))

    def _prepare_end(self, dataloader: Batches | None) -> Commit:  # noqa: ARG002
        refuse_broken(self.name, self.model)
        teacher = Snapshot(self.model)

        def commit() -> None:
            self._teacher = teacher

        return commit

    # ------------------------------------------------------------------ state

    def _extra_state(self) -> dict[str, Any]:
        return {} if self._teacher is None else {"teacher": self._teacher.state_dict()}

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        owner = f"{self.name}: state_dict['extra']"
        if unknown := sorted(extra.keys() - {"teacher"}, key=str):
            raise ValueError(f"{owner} holds {unknown[0]!r}, expected 'teacher' or nothing")
        teacher = None
        if extra:
            teacher = Snapshot.load(f"{owner}['teacher']", self.model, extra["teacher"])

        def commit() -> None:
            self._teacher = teacher

        return commit

    def _move_extra_state(self, device: device) -> None:
        if self._teacher is not None:
            self._teacher.move(device)
