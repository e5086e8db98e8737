"""Joint training: all tasks so far at once, which no method can beat that forgets nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clext.core.batches import check_alike, owned
from clext.core.inputs import concatenated, mapped
from clext.core.parameters import device_of
from clext.methods.base import Method

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Unpack

    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions
    from clext.methods.base import Examples


class Joint(Method):
    """Joint training: each task on the data of all tasks so far, the upper bound of the others.

    `begin_task` returns the examples of all tasks begun, with global labels, and the loss is their
    cross entropy. In a loop of your own::

        inputs, labels = method.begin_task((task_inputs, task_labels), block=..., active=...)

    and train on rows of these. Nothing bounds the memory: the examples of all tasks are kept, by
    reference where that is possible, and are in the state dict.

    Args:
        model: see `Method`.
        strength: none; there is no penalty.
    """

    name: ClassVar[str] = "joint"
    has_own_loss: ClassVar[bool] = True
    needs_examples: ClassVar[bool] = True

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        strength: float | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        # Inputs and global labels of each task begun, by its number: a task that is begun again
        # replaces what it was.
        self._examples: dict[int, Examples] = {}

    def _follow_model(self) -> None:
        self._examples = self._each(lambda entry: entry.to(device_of(self.model)))

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if examples is None:
            return None
        inputs, labels = examples
        new = owned(inputs), self.heads.with_start(inputs, labels)
        earlier = [pair for task, pair in self._examples.items() if task != self.tasks]
        for known, _ in earlier[:1]:
            check_alike(self.name, inputs, known, "of the tasks before")
        self._examples[self.tasks] = new
        together: Examples = concatenated([*earlier, new])
        return together if earlier else new

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401, ARG002
        if self.tasks not in self._examples:
            raise RuntimeError(
                f"{self.name} has not seen the examples of this task: call begin_task((inputs, "
                "labels)) with all of them, and train on rows of what it returns"
            )
        return self.heads.loss_over_tasks(inputs, labels)

    def _each(self, function: Callable[[Tensor], Tensor]) -> dict[int, Examples]:
        """The examples with `function` of each tensor."""
        return {task: mapped(function, pair) for task, pair in self._examples.items()}

    def _save(self) -> dict[str, Any]:
        copies = {task: list(pair) for task, pair in self._each(torch.clone).items()}
        return {"extra": {"examples": copies}}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        device = device_of(self.model)
        self._examples = {
            task: mapped(lambda entry: entry.to(device, copy=True), tuple(pair))
            for task, pair in state["extra"]["examples"].items()
        }
