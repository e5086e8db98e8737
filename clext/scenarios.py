"""Scenarios: how one data set becomes a sequence of tasks.

A task is a function from a split of the data set to the split that the task is about, applied to
the training and the test split alike. That covers input transformations (permuted, rotated) and
selections of classes (split). A new scenario is a function like `permuted` and a line in
`SCENARIOS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clext.data import Dataset, Split
from clext.options import unknown_name
from clext.seeding import generator


@dataclass(frozen=True)
class Task:
    """One task: its name and what it makes of a split of the data set."""

    name: str
    transform: Callable[[Split], Split]


@dataclass(frozen=True)
class Scenario:
    """A sequence of tasks for one model with `num_outputs` outputs."""

    name: str
    tasks: Sequence[Task]
    num_outputs: int


def permuted(dataset: Dataset, tasks: int, seed: int) -> Scenario:
    """Permuted MNIST (Goodfellow et al. 2013, arXiv:1312.6211): domain-incremental.

    Each task, the first one too, shuffles the pixels of every image by a permutation of its own,
    drawn from `seed` on the CPU so that every device sees the same tasks. Labels stay.
    """
    random = generator(seed)
    permutations = [torch.randperm(dataset.features, generator=random) for _ in range(tasks)]
    return Scenario(
        "permuted",
        [Task(f"permutation {k}", _Permute(p)) for k, p in enumerate(permutations, start=1)],
        dataset.num_classes,
    )


@dataclass(frozen=True)
class _Permute:
    permutation: torch.Tensor

    def __call__(self, split: Split) -> Split:
        order = self.permutation.to(split.inputs.device)
        return Split(split.inputs.index_select(1, order), split.labels)


SCENARIOS: dict[str, Callable[[Dataset, int, int], Scenario]] = {"permuted": permuted}


def make_scenario(name: str, dataset: Dataset, tasks: int, seed: int) -> Scenario:
    """The scenario called `name` over `dataset`; ValueError for an unknown name."""
    check_scenario(name)
    return SCENARIOS[name](dataset, tasks, seed)


def check_scenario(name: str) -> None:
    """ValueError if there is no scenario called `name`."""
    if name not in SCENARIOS:
        raise unknown_name("scenario", name, SCENARIOS)
