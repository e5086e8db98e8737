"""The scenarios that are made of one data set: permuted, rotated, split.

A new one is a function like these and its name in `SCENARIOS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clext.core.seeding import generator
from clext.data.datasets import Dataset, Split
from clext.data.scenario import Scenario, Task


def permuted(dataset: Dataset, tasks: int, seed: int, incremental: str) -> Scenario:
    """Permuted MNIST (Goodfellow et al. 2013, arXiv:1312.6211).

    Each task, the first one too, shuffles the pixels of every image by a permutation of its own,
    drawn from `seed` on the CPU so that every device sees the same tasks.
    """
    random = generator(seed)
    permutations = [torch.randperm(dataset.features, generator=random) for _ in range(tasks)]
    named = {f"permutation {k}": _Permute(p) for k, p in enumerate(permutations, start=1)}
    return _of_all_classes("permuted", dataset, named, incremental)


def rotated(dataset: Dataset, tasks: int, seed: int, incremental: str) -> Scenario:  # noqa: ARG001
    """Rotated MNIST (Lopez-Paz and Ranzato 2017, arXiv:1706.08840).

    Task k of T, from 0, turns every image counter-clockwise by k * 180 / T degrees, with bilinear
    interpolation. Nothing is drawn.
    """
    side = math.isqrt(dataset.features)
    if side * side != dataset.features:
        raise ValueError(
            f"scenario 'rotated' needs square images, got {dataset.features} features in "
            f"{dataset.name}"
        )
    angles = [180 * k / tasks for k in range(tasks)]
    named = {f"{angle:g} degrees": _Rotate(angle, side) for angle in angles}
    return _of_all_classes("rotated", dataset, named, incremental)


def split(dataset: Dataset, tasks: int, seed: int, incremental: str) -> Scenario:  # noqa: ARG001
    """Split MNIST (Zenke et al. 2017, arXiv:1703.04200): so many classes to each task, in order.

    Five tasks of MNIST tell 0 from 1, 2 from 3, and so on. With incremental="domain" the labels are
    the places within the task: even or odd. Nothing is drawn.
    """
    count, rest = divmod(dataset.num_classes, tasks)
    if rest or not count:
        fitting = [n for n in range(1, dataset.num_classes + 1) if dataset.num_classes % n == 0]
        raise ValueError(
            f"scenario 'split' cannot make {tasks} tasks of the same size of the "
            f"{dataset.num_classes} classes of {dataset.name}; choose tasks from {fitting}"
        )
    made = []
    for first in range(0, dataset.num_classes, count):
        start = 0 if incremental == "domain" else first
        transform = _Select(range(first, first + count), start)
        title = f"classes {first} to {first + count - 1}" if count > 1 else f"class {first}"
        made.append(
            Task(title, range(start, start + count), dataset.train, dataset.test, transform)
        )
    return Scenario("split", incremental, made, dataset.describe())


def _of_all_classes(
    name: str,
    dataset: Dataset,
    inputs: Mapping[str, Callable[[Tensor], Tensor]],
    incremental: str,
) -> Scenario:
    """Tasks that each have all classes, with inputs of their own."""
    classes = dataset.num_classes
    made: list[Task] = []
    for title, change in inputs.items():
        start = 0 if incremental == "domain" else len(made) * classes
        outputs = range(start, start + classes)
        made.append(Task(title, outputs, dataset.train, dataset.test, _Change(change, start)))
    return Scenario(name, incremental, made, dataset.describe())


@dataclass(frozen=True)
class _Change:
    """Other inputs, and the labels moved to the task's outputs."""

    change: Callable[[Tensor], Tensor]
    start: int

    def __call__(self, given: Split) -> Split:
        labels = given.labels + self.start if self.start else given.labels
        return Split(self.change(given.inputs), labels)


@dataclass(frozen=True)
class _Permute:
    permutation: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        return inputs.index_select(1, self.permutation.to(inputs.device))


@dataclass(frozen=True)
class _Rotate:
    degrees: float
    side: int

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.degrees == 0:
            return inputs
        angle = math.radians(self.degrees)
        # Where each pixel of the result comes from: the turn backwards, y pointing down.
        turn = [
            [math.cos(angle), -math.sin(angle), 0.0],
            [math.sin(angle), math.cos(angle), 0.0],
        ]
        theta = torch.tensor([turn], dtype=inputs.dtype, device=inputs.device)
        # The images as channels of one: they share a grid, which would else be made for each.
        images = inputs.reshape(1, len(inputs), self.side, self.side)
        grid = F.affine_grid(theta, [1, 1, self.side, self.side], align_corners=False)
        turned = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
        return turned.reshape(inputs.shape)


@dataclass(frozen=True)
class _Select:
    """The examples of some classes, which become the outputs from `start` on."""

    classes: Sequence[int]
    start: int

    def __call__(self, given: Split) -> Split:
        wanted = torch.tensor(self.classes, device=given.labels.device)
        rows = torch.isin(given.labels, wanted).nonzero().flatten()
        labels = given.labels.index_select(0, rows) - self.classes[0] + self.start
        return Split(given.inputs.index_select(0, rows), labels)
