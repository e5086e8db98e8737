"""How much of each task a method still knows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from clext.core.modes import module_mode
from clext.data.datasets import Batches, Split

if TYPE_CHECKING:
    from clext.data.scenarios import Scenario
    from clext.methods import Method
    from clext.training.metrics import Step

# Large enough that a batch keeps every core busy, small enough for any model's activations.
EVALUATION_BATCH = 1000


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that the model runs in: bfloat16 where "bf16" allows it, else no change."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


@torch.no_grad()
def evaluate(method: Method, split: Split, precision: str = "fp32") -> float:
    """The share of `split`, with local labels, that the method classifies correctly.

    The model is in eval mode meanwhile.
    """
    device = split.labels.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with module_mode(method.model, training=False), autocast(device, precision):
        for inputs, labels in Batches(split, EVALUATION_BATCH):
            correct += (method.predict(inputs).argmax(dim=1) == labels).sum()
    return int(correct) / len(split.labels)


@dataclass(frozen=True)
class Examiner:
    """Takes the accuracies of a method on the tasks of a scenario."""

    method: Method
    scenario: Scenario
    precision: str = "fp32"

    def accuracy(self, task: int, seen: int) -> float:
        """On the test data of `task`, with tasks 0..seen begun."""
        test = self.scenario.tasks[task].test()
        outputs = self.method.outputs
        with outputs.selected(self.scenario.active(task, seen)):
            return evaluate(
                self.method, Split(test.inputs, test.labels - outputs.start), self.precision
            )

    def accuracies(self, seen: int) -> list[float]:
        """On each of the tasks 0..seen."""
        return [self.accuracy(task, seen) for task in range(seen + 1)]


class Trace:
    """The accuracies on the tasks seen, within a task: every so many steps.

    Args:
        examiner: takes the accuracies.
        every: steps between two of them; None for never.
        steps: gets what was found.
        clock: a context to take them in, which counts their time apart.
    """

    def __init__(
        self,
        examiner: Examiner,
        every: int | None,
        steps: list[Step],
        clock: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._examiner, self._every, self._steps, self._clock = examiner, every, steps, clock
        self._task = self._taken = 0

    def begin_task(self, task: int) -> None:
        """The coming steps are those of `task`."""
        self._task, self._taken = task, 0

    def step(self) -> None:
        """A step was taken."""
        self._taken += 1
        if self._every is not None and self._taken % self._every == 0:
            with self._clock():
                accuracies = self._examiner.accuracies(self._task)
            self._steps.append({"task": self._task, "step": self._taken, "accuracy": accuracies})
