"""Evaluation: how much of each task a method still knows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clext.core.inputs import described
from clext.core.modes import module_mode
from clext.core.parameters import device_of
from clext.data.datasets import Batches
from clext.data.loaders import LoaderTask

if TYPE_CHECKING:
    from clext.data.scenario import Scenario
    from clext.data.task import Task
    from clext.methods import Method

# Large enough that a batch keeps every core busy, small enough for any model's activations.
EVALUATION_BATCH = 1000


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that the model runs in: bfloat16 where "bf16" allows it, else no change."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def evaluate(
    method: Method, batches: Iterable[Any], precision: str = "fp32", active: range | None = None
) -> float:
    """The share of the examples that the method classifies correctly among the outputs `active`.

    Labels [N] count from the model's first output. The model is in eval mode meanwhile.
    """
    device, start = device_of(method.model), 0 if active is None else active.start
    correct, count = torch.zeros((), dtype=torch.int64, device=device), 0
    with module_mode(method.model, training=False), autocast(device, precision):
        for batch in batches:
            inputs, labels = method.heads.inputs_and_labels(batch)
            if labels is None or labels.dim() != 1:
                raise ValueError(
                    f"test data: labels of a batch are {described(labels)}, expected a class for "
                    "each example, [N]"
                )
            predicted = method.predict(inputs, active=active).argmax(dim=1) + start
            correct += (predicted == labels).sum()
            count += len(labels)
    return int(correct) / count


def test_batches(task: Task | LoaderTask, method: Method) -> Iterable[Any]:
    """What a task is tested on: batches with global labels, as large as the loaders' or our own."""
    if isinstance(task, LoaderTask):
        return task.test_batches(method.heads.inputs_and_labels)
    return Batches(task.test(), EVALUATION_BATCH)


@dataclass(frozen=True)
class Evaluator:
    """Takes the accuracies of a method on the tasks of a scenario."""

    method: Method
    scenario: Scenario
    precision: str = "fp32"

    def accuracy(self, task: int, seen: int) -> float:
        """On the test data of `task`, with tasks 0..seen begun."""
        return evaluate(
            self.method,
            test_batches(self.scenario.tasks[task], self.method),
            self.precision,
            self.scenario.active(task, seen),
        )

    def accuracies(self, seen: int) -> list[float]:
        """On each of the tasks 0..seen."""
        return [self.accuracy(task, seen) for task in range(seen + 1)]
