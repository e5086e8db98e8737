"""Evaluation: how much of each task a method still knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clext.core.modes import module_mode
from clext.data.datasets import Batches, Split

if TYPE_CHECKING:
    from clext.data.scenario import Scenario
    from clext.methods import Method

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
