"""Chance: the accuracy of always giving the most frequent class."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from clext.data.task import Task

if TYPE_CHECKING:
    from torch import Tensor

    from clext.data.scenario import Scenario
    from clext.training.result import Result


def class_shares(labels: Tensor, outputs: int = 0) -> Tensor:
    """The share of each class among `labels` [N]: float64, at least [outputs], on the CPU."""
    return labels.cpu().bincount(minlength=outputs).double() / len(labels)


def chance_levels(scenario: Scenario) -> list[float]:
    """Entry k: the mean accuracy on the tests of tasks 0..k where the answer is always the same.

    The answer may differ from task to task where each has a head of its own. Of loaders it is not
    known, and there are none.
    """
    outputs = scenario.num_outputs
    labels = [task.test().labels for task in scenario.tasks if isinstance(task, Task)]
    if len(labels) < len(scenario.tasks):
        return []
    shares = torch.stack([class_shares(own, outputs) for own in labels])
    count = torch.arange(1, len(shares) + 1)
    if scenario.incremental == "task":
        levels: list[float] = (shares.amax(1).cumsum(0) / count).tolist()
    else:
        levels = (shares.cumsum(0).amax(1) / count).tolist()
    return levels


def shared_chance(results: Iterable[Result]) -> list[float]:
    """The chance of runs on the same tasks; none if theirs differ, or it is not known."""
    known = [result.chance for result in results if result.chance]
    return known[0] if known and all(chance == known[0] for chance in known) else []
