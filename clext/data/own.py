"""Tasks of a user's own data sets, checked, read into memory and numbered."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from clext.data.datasets import Split
from clext.data.task import Task

_OWNER = "Scenario.from_datasets"
_READ_AT_ONCE = 256


def own_tasks(datasets: Iterable[Any], incremental: str) -> list[Task]:
    """The tasks of `Scenario.from_datasets`."""
    if not isinstance(datasets, Iterable) or isinstance(datasets, Tensor | str):
        raise ValueError(
            f"{_OWNER}: datasets must be a list with a pair (training data, test data) for each "
            f"task, got {type(datasets).__name__}"
        )
    pairs: list[tuple[Split, Split]] = []
    for number, pair in enumerate(datasets, start=1):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            got = f"{len(pair)} values" if isinstance(pair, tuple | list) else type(pair).__name__
            raise ValueError(
                f"{_OWNER}: task {number} must be a pair (training data, test data), got {got}"
            )
        whats = [f"{_OWNER}: task {number}, {kind} data" for kind in ("training", "test")]
        train, test = (_read(given, what) for given, what in zip(pair, whats, strict=True))
        pairs.append((train, test))
        for split, what in zip(pairs[-1], whats, strict=True):
            _check_like_first(split.inputs, pairs[0][0].inputs, what)
    return _numbered(pairs, incremental)


def _check_like_first(inputs: Tensor, first: Tensor, what: str) -> None:
    if inputs.shape[1:] != first.shape[1:]:
        raise ValueError(
            f"{what}: examples have shape {list(inputs.shape[1:])}, expected "
            f"{list(first.shape[1:])} as in the first task; bring them to one shape, images by "
            "torch.nn.functional.interpolate"
        )
    if inputs.dtype != first.dtype:
        raise ValueError(
            f"{what}: inputs are {inputs.dtype}, expected {first.dtype} as in the first task"
        )


def _numbered(pairs: list[tuple[Split, Split]], incremental: str) -> list[Task]:
    """The tasks with labels that are outputs of one model."""
    own = [train.labels.unique().tolist() for train, _ in pairs]
    everywhere = {label for classes in own for label in classes}
    places: dict[int, int] = {}  # the output of each label
    used, tasks = 0, []
    for number, ((train, test), classes) in enumerate(zip(pairs, own, strict=True), start=1):
        # Domains share the classes.
        known, whose = (everywhere, "the") if incremental == "domain" else (set(classes), "its")
        strangers = set(test.labels.unique().tolist()) - known
        if strangers:
            raise ValueError(
                f"{_OWNER}: task {number}, test data: class {min(strangers)} is not among the "
                f"{len(known)} classes of {whose} training data"
            )
        if incremental == "domain":
            if classes[0] < 0:
                raise ValueError(
                    f"{_OWNER}: task {number}: label {classes[0]}, expected numbers from 0 "
                    'where incremental="domain"'
                )
            tasks.append(Task(f"task {number}", range(max(everywhere) + 1), train, test))
            continue
        if incremental == "task":
            places = {}
        for label in classes:
            if label not in places:
                places[label], used = used, used + 1
        outputs = [places[label] for label in classes]
        placed = [_placed(split, classes, outputs) for split in (train, test)]
        block = range(min(outputs), max(outputs) + 1)
        tasks.append(Task(f"task {number}", block, placed[0], placed[1]))
    return tasks


def _placed(split: Split, classes: list[int], outputs: list[int]) -> Split:
    """The split with each of `classes`, which are sorted, as the output of the same place."""
    sorted_classes = torch.tensor(classes, device=split.labels.device)
    at = torch.searchsorted(sorted_classes, split.labels)
    return Split(split.inputs, torch.tensor(outputs, device=split.labels.device)[at])


def _read(given: object, what: str) -> Split:
    if isinstance(given, tuple | list) and len(given) == 2 and isinstance(given[0], Tensor):
        inputs, labels = given
    elif isinstance(given, TorchDataset):
        inputs, labels = _read_dataset(given, what)
    else:
        got = type(given).__name__
        if isinstance(given, tuple | list) and len(given) == 2:
            got = f"{type(given[0]).__name__} as inputs; make tensors of arrays by torch.as_tensor"
        raise ValueError(
            f"{what} must be a pair of tensors (inputs, labels) or a torch.utils.data.Dataset, got "
            f"{got}"
        )
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{what}: labels are no tensor of integers, and cannot be made one"
        ) from None
    for part, entry in (("inputs", inputs), ("labels", labels)):
        if entry.layout != torch.strided or entry.is_meta:
            kind = "on the meta device" if entry.is_meta else str(entry.layout)
            raise ValueError(f"{what}: {part} are {kind}, expected a dense tensor with values")
    if inputs.dim() == 0:
        raise ValueError(f"{what}: inputs are a 0-dim tensor, expected one row for each example")
    if labels.dim() != 1 or len(labels) != len(inputs):
        raise ValueError(
            f"{what}: labels have shape {list(labels.shape)}, expected [{len(inputs)}], one for "
            "each example"
        )
    if not len(labels):
        raise ValueError(f"{what} has no examples")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{what}: labels are {labels.dtype}, expected integers")
    if inputs.is_complex():
        raise ValueError(f"{what}: inputs are {inputs.dtype}, expected real numbers")
    if inputs.dtype == torch.uint8:
        raise ValueError(f"{what}: inputs are uint8; pass .float() / 255")
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise ValueError(f"{what}: inputs hold NaN or infinity")
    return Split(inputs.detach(), labels.detach().to(torch.int64))


def _read_dataset(dataset: TorchDataset[Any], what: str) -> tuple[Tensor, Tensor]:
    """All examples of a data set as two tensors."""
    if not isinstance(dataset, Sized):
        raise ValueError(f"{what} has no length; expected a data set of examples by number")
    if not len(dataset):
        raise ValueError(f"{what} has no examples")
    # Of its own: a loader draws a number from torch's generator even if it does not shuffle.
    random = torch.Generator().manual_seed(0)
    try:
        batches = [
            (torch.as_tensor(inputs), torch.as_tensor(labels))
            for inputs, labels in DataLoader(dataset, _READ_AT_ONCE, generator=random)
        ]
    except (TypeError, ValueError, RuntimeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{what}: examples could not be read as pairs of a tensor and a label ({reason}); all "
            "must be of one shape, and if they are images pass the data set transform="
            "torchvision.transforms.ToTensor()"
        ) from error
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels)
