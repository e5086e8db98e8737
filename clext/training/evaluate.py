"""Evaluation: how much of each task a method still knows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from clext.core.modes import module_mode
from clext.data.datasets import Batches, Split

if TYPE_CHECKING:
    from clext.data.scenario import Scenario
    from clext.methods import Method
    from clext.training.metrics import Step
    from clext.training.timer import Timer

# Large enough that a batch keeps every core busy, small enough for any model's activations.
EVALUATION_BATCH = 1000


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that the model runs in: bfloat16 where "bf16" allows it, else no change."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def evaluate(
    method: Method, split: Split, precision: str = "fp32", active: range | None = None
) -> float:
    """The share of `split` that the method classifies correctly among the outputs `active`.

    Labels count from the model's first output. The model is in eval mode meanwhile.
    """
    device, start = split.labels.device, 0 if active is None else active.start
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with module_mode(method.model, training=False), autocast(device, precision):
        for inputs, labels in Batches(split, EVALUATION_BATCH):
            predicted = method.predict(inputs, active=active).argmax(dim=1) + start
            correct += (predicted == labels).sum()
    return int(correct) / len(split.labels)


@dataclass(frozen=True)
class Evaluator:
    """Takes the accuracies of a method on the tasks of a scenario."""

    method: Method
    scenario: Scenario
    precision: str = "fp32"

    def accuracy(self, task: int, seen: int) -> float:
        """On the test data of `task`, with tasks 0..seen begun."""
        test, active = self.scenario.tasks[task].test(), self.scenario.active(task, seen)
        return evaluate(self.method, test, self.precision, active)

    def accuracies(self, seen: int) -> list[float]:
        """On each of the tasks 0..seen."""
        return [self.accuracy(task, seen) for task in range(seen + 1)]


@dataclass
class AccuracyLog:
    """The accuracies on the tasks seen, within a task: every so many steps.

    Attributes:
        evaluator: takes the accuracies.
        timer: counts their time apart.
        every: steps between two of them; None for never.
        entries: what was found.
    """

    evaluator: Evaluator
    timer: Timer
    every: int | None
    entries: list[Step]
    _task: int = field(default=0, init=False)
    _taken: int = field(default=0, init=False)

    def begin_task(self, task: int) -> None:
        """The coming steps are those of `task`."""
        self._task, self._taken = task, 0

    def step(self) -> None:
        """A step was taken."""
        self._taken += 1
        if self.every is not None and self._taken % self.every == 0:
            with self.timer.measure("evaluation"):
                accuracies = self.evaluator.accuracies(self._task)
            self.entries.append({"task": self._task, "step": self._taken, "accuracy": accuracies})
