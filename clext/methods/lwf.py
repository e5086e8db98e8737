"""Learning without Forgetting (Li and Hoiem 2016, arXiv:1606.09282)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from clext.core.batches import added_logits
from clext.core.checks import softening
from clext.core.inputs import rows
from clext.core.parameters import device_of
from clext.methods.parts.teacher import (
    SCALES,
    Teacher,
    check_teacher,
    distillation_loss,
    old_heads,
)
from clext.methods.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from torch import Tensor, nn

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions
    from clext.methods.base import Examples


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
    needs_classes: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        balance: str = "sum",
        temperature: float = 2.0,
        scale: str = "squared",
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, balance=balance, **supervision)
        self.temperature = softening(self.name, temperature)
        self.scale = self._choice("scale", scale)
        self._teacher: Teacher | None = None  # the model at the end of the last task

    def _follow_model(self) -> None:
        if self._teacher is not None:
            self._teacher.to(device_of(self.model))

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if self._teacher is None or examples is None:
            return examples
        inputs, _ = self.heads.inputs_and_labels(examples)
        return (*examples, self._teacher.record(inputs))

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401
        """With the teacher's logits for all outputs, [N, outputs], as third argument or without."""
        logits = self.heads.logits(inputs)
        if self._teacher is None:
            return self.heads.loss(inputs, labels, self.heads.narrow(logits))
        recorded = added_logits(rows(inputs), more)
        teacher = self._teacher(inputs) if recorded is None else recorded
        self.heads.check_width(self.name, logits.shape[1], teacher.shape[1])
        losses = [
            distillation_loss(logits[:, now], teacher[:, then], self.temperature, self.scale)
            for now, then in old_heads(self.heads, self.tasks, teacher.shape[1])
        ]
        current = self.heads.loss(inputs, labels, self.heads.narrow(logits))
        return self._balanced(current, self._over_tasks(losses))

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        check_teacher(self.name, self.model)
        self._teacher = Teacher(self.model, self.heads.logits)

    def _save(self) -> dict[str, Any]:
        return {"extra": {} if self._teacher is None else {"teacher": self._teacher.state_dict()}}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        given = state["extra"].get("teacher")
        self._teacher = Teacher.load(self.model, given, self.heads.logits)
