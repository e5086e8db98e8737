"""Training on everything: what no method can beat that forgets nothing by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from clext.methods.parts.batch import labelled
from clext.methods.parts.examples import check_alike, check_examples
from clext.methods.unpenalised import Unpenalised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clext.methods.learning import Examples
    from clext.methods.stateful import Commit


class Joint(Unpenalised):
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
    memory: ClassVar[dict[str, str]] = {"examples": "T*N*(4*X+8)", "labels of the task": "8*N"}

    # Inputs and global labels of each task begun, by its number: a task that is begun again
    # replaces what it was.
    _examples: dict[int, tuple[Tensor, Tensor]]

    def __init__(self, model: torch.nn.Module, *, strength: float | None = None) -> None:
        super().__init__(model, strength=strength)
        self._examples = {}

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if examples is None:
            return None
        new = check_examples(self, examples)
        earlier = [entry for task, entry in self._examples.items() if task != self.tasks]
        if earlier:
            check_alike(self.name, new[0], earlier[0][0], "of the tasks before")
        inputs, labels = zip(*earlier, new, strict=True)
        joined = (torch.cat(inputs), torch.cat(labels)) if earlier else new
        self._examples[self.tasks] = new
        return joined

    def _has_global_labels(self, batch: Examples) -> bool:  # noqa: ARG002
        return True

    def _loss(self, *batch: Tensor) -> Tensor:
        if self.tasks not in self._examples:
            raise RuntimeError(
                f"{self.name} has not seen the examples of this task: call begin_task((inputs, "
                "labels)) with all of them, and train on rows of what it returns"
            )
        inputs, labels = labelled(self.name, batch)
        return self.outputs.cross_entropy(inputs, labels)

    def _extra_state(self) -> dict[str, Any]:
        copies = {task: [entry.clone() for entry in pair] for task, pair in self._examples.items()}
        return {"examples": copies}

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        device = self._state.params[0].device
        loaded = _checked_examples(f"{self.name}: state_dict['extra']", extra)

        def commit() -> None:
            self._examples = {
                task: (inputs.to(device, copy=True), labels.to(device, copy=True))
                for task, (inputs, labels) in loaded.items()
            }

        return commit

    def _move_extra_state(self, device: torch.device) -> None:
        self._examples = {
            task: (inputs.to(device), labels.to(device))
            for task, (inputs, labels) in self._examples.items()
        }


def _checked_examples(owner: str, extra: Mapping[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """The examples of each task, as `state_dict` has them; ValueError if they are not such."""
    given = extra.get("examples")
    if set(extra) != {"examples"} or not isinstance(given, dict):
        raise ValueError(f"{owner} holds {', '.join(extra) or 'nothing'}, expected examples")
    checked = {}
    for task, pair in given.items():
        if (
            not isinstance(pair, list)
            or [isinstance(entry, Tensor) for entry in pair] != [True] * 2
        ):
            raise ValueError(f"{owner}: task {task!r} has no inputs and labels")
        inputs, labels = pair
        if type(task) is not int or labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
            raise ValueError(
                f"{owner}: task {task!r} has labels {labels.dtype} {list(labels.shape)}, expected "
                f"int64 {list(inputs.shape[:1])} for a task by number"
            )
        checked[task] = inputs, labels
    return checked
