"""What a scenario is: tasks, each with data and outputs, and which outputs compete."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clext.core.checks import choice
from clext.core.names import INCREMENTAL
from clext.data.datasets import Split
from clext.data.own import own_tasks
from clext.data.task import Task


@dataclass(frozen=True, repr=False)
class Scenario:
    """A sequence of tasks for one model with `num_outputs` outputs.

    Args:
        name: as in titles and results.
        incremental: what the model has to tell (van de Ven and Tolias 2019, arXiv:1904.07734):

            - "domain": the classes are the same in all tasks, and one head is shared by all;
            - "task": each task has a head of its own, and the task is known when tested;
            - "class": one head grows over the classes of all tasks, and all classes seen so far
              compete, when a task is learned and when it is tested.
        tasks: in the order in which they are learned.
        data: what a result records of the data: "name" and what else there is to say.

    Raises:
        ValueError: there is no task, or `incremental` is none of the three.
    """

    name: str
    incremental: str
    tasks: Sequence[Task]
    data: dict[str, Any]

    def __post_init__(self) -> None:
        choice("Scenario", "incremental", self.incremental, INCREMENTAL)
        if not self.tasks:
            raise ValueError("Scenario: expected at least one task, got none")

    def __repr__(self) -> str:
        count = f"{len(self.tasks)} task{'s' if len(self.tasks) != 1 else ''}"
        head = f"Scenario {self.name!r}, {self.incremental}-incremental, {count}:"
        return "\n".join([head, *(f"  {task!r}" for task in self.tasks)])

    @property
    def num_outputs(self) -> int:
        """Outputs that a model needs for all tasks."""
        return max(task.outputs.stop for task in self.tasks)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.tasks[0].stored_train.inputs.shape[1:])

    def active(self, task: int, seen: int) -> range | None:
        """The outputs that compete in `task` once tasks 0..seen were begun; None for all."""
        if self.incremental == "domain":
            return None
        if self.incremental == "task":
            return self.tasks[task].outputs
        return range(max(known.outputs.stop for known in self.tasks[: max(task, seen) + 1]))

    def to(self, device: torch.device, dtype: torch.dtype) -> Scenario:
        """The same scenario with its tensors on `device`, floating-point inputs as `dtype`."""
        moved: dict[int, Split] = {}

        def move(stored: Split) -> Split:
            if id(stored) not in moved:
                kept = dtype if stored.inputs.is_floating_point() else stored.inputs.dtype
                moved[id(stored)] = stored.to(device, kept)
            return moved[id(stored)]

        tasks = [
            replace(task, stored_train=move(task.stored_train), stored_test=move(task.stored_test))
            for task in self.tasks
        ]
        return replace(self, tasks=tasks)

    @classmethod
    def from_datasets(
        cls, datasets: Iterable[Any], incremental: str = "domain", *, name: str = "own"
    ) -> Scenario:
        """A scenario of your own tasks.

        Args:
            datasets: for each task a pair (training data, test data), each a pair of tensors
                (inputs [N, ...], integer labels [N]) or a `torch.utils.data.Dataset` of such
                examples with a length, such as those of torchvision. All examples have one shape.
                Everything is read into memory once.
            incremental: see `Scenario`. Labels are, for "domain", numbers from 0 that mean the same
                in all tasks; for "task" and "class" any integers: they get outputs of the model in
                their order, task by task.
            name: as in titles and results.

        Raises:
            ValueError: a task without examples, labels that do not fit, tests with classes that the
                training data of the task have not, shapes or types that differ, or inputs of
                bytes, which no layer with floating-point weights takes.
        """
        choice("Scenario.from_datasets", "incremental", incremental, INCREMENTAL)
        tasks = own_tasks(datasets, incremental)
        counts = {
            "train": sum(len(task.stored_train.labels) for task in tasks),
            "test": sum(len(task.stored_test.labels) for task in tasks),
        }
        return cls(name, incremental, tasks, {"name": "tasks", **counts})
