"""The tasks that are made of one data set: permuted, rotated, split.

A new scenario is a function like these in `MAKERS`, and its name in `clext.core.names`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from clext.core import names
from clext.core.seeding import generator
from clext.data.datasets import Dataset, Split, as_numbers
from clext.data.task import Task


def permuted(dataset: Dataset, tasks: int, seed: int, incremental: str) -> list[Task]:
    """Permuted MNIST (Goodfellow et al. 2013, arXiv:1312.6211).

    Each task, the first one too, shuffles the pixels of every image by a permutation of its own,
    drawn from `seed` on the CPU so that every device sees the same tasks. The colours of a pixel
    stay together.
    """
    random = generator(seed)
    pixels = _as_rows(dataset.train.inputs).shape[1]
    orders = [torch.randperm(pixels, generator=random) for _ in range(tasks)]
    named = {f"permutation {k}": partial(_permute, order=p) for k, p in enumerate(orders, start=1)}
    return _of_all_classes(dataset, named, incremental)


def rotated(dataset: Dataset, tasks: int, seed: int, incremental: str) -> list[Task]:  # noqa: ARG001
    """Rotated MNIST (Lopez-Paz and Ranzato 2017, arXiv:1706.08840).

    Task k of T, from 0, turns every image counter-clockwise by k * 180 / T degrees, with bilinear
    interpolation. Nothing is drawn.
    """
    pixels = _as_rows(dataset.train.inputs).shape[1]
    side = math.isqrt(pixels)
    if side * side != pixels:
        raise ValueError(
            f"scenario 'rotated' needs square images, got {pixels} pixels in {dataset.name}"
        )
    angles = [180 * k / tasks for k in range(tasks)]
    named = {f"{angle:g} degrees": partial(_rotate, degrees=angle, side=side) for angle in angles}
    return _of_all_classes(dataset, named, incremental)


def split(dataset: Dataset, tasks: int, seed: int, incremental: str) -> list[Task]:  # noqa: ARG001
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
        select = partial(_select, classes=range(first, first + count), start=start)
        title = f"classes {first} to {first + count - 1}" if count > 1 else f"class {first}"
        made.append(Task(title, range(start, start + count), dataset.train, dataset.test, select))
    return made


MAKERS = dict(zip(names.SCENARIOS, (permuted, rotated, split), strict=True))


def _of_all_classes(
    dataset: Dataset,
    inputs: Mapping[str, Callable[[Tensor], Tensor]],
    incremental: str,
) -> list[Task]:
    """Tasks that each have all classes, with inputs of their own."""
    classes = dataset.num_classes
    made: list[Task] = []
    for title, change in inputs.items():
        start = 0 if incremental == "domain" else len(made) * classes
        moved = partial(_change, inputs=change, start=start)
        made.append(Task(title, range(start, start + classes), dataset.train, dataset.test, moved))
    return made


def _change(given: Split, inputs: Callable[[Tensor], Tensor], start: int) -> Split:
    """Other inputs, and the labels moved to the task's outputs."""
    return Split(inputs(given.inputs), given.labels + start if start else given.labels)


def _as_rows(images: Tensor) -> Tensor:
    """The pixels of each image, or of each of its colours, as a row: [rows, pixels]."""
    return images.flatten(2).flatten(0, 1) if images.dim() == 4 else images


def _permute(inputs: Tensor, order: Tensor) -> Tensor:
    rows = _as_rows(as_numbers(inputs))  # torch selects bytes far more slowly
    return rows.index_select(1, order.to(inputs.device)).reshape(inputs.shape)


def _rotate(inputs: Tensor, degrees: float, side: int) -> Tensor:
    if degrees == 0:
        return inputs
    inputs, angle = as_numbers(inputs), math.radians(degrees)
    # Where each pixel of the result comes from: the turn backwards, y pointing down.
    turn = [[math.cos(angle), -math.sin(angle), 0.0], [math.sin(angle), math.cos(angle), 0.0]]
    theta = torch.tensor([turn], dtype=inputs.dtype, device=inputs.device)
    # The images as channels of one: they share a grid, which would else be made for each.
    images = inputs.reshape(1, -1, side, side)
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)
    return F.grid_sample(images, grid, align_corners=False).reshape(inputs.shape)


def _select(given: Split, classes: range, start: int) -> Split:
    """The examples of some classes, which become the outputs from `start` on."""
    wanted = torch.tensor(classes, device=given.labels.device)
    rows = torch.isin(given.labels, wanted).nonzero().flatten()
    labels = given.labels.index_select(0, rows) - classes[0] + start
    return Split(given.inputs.index_select(0, rows), labels)
