"""Tasks of a user's own data sets, checked, read into memory and numbered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from clext.core.batches import check_alike, check_examples, class_labels
from clext.core.inputs import described
from clext.data.datasets import Split
from clext.data.task import Task

_OWNER = "Scenario.from_datasets"
_READ_AT_ONCE = 256
_LIKE_FIRST = "of the first task; images become alike by torch.nn.functional.interpolate"


def own_tasks(datasets: Iterable[Any], incremental: str) -> list[Task]:
    """The tasks of `Scenario.from_datasets`."""
    if not isinstance(datasets, Iterable) or isinstance(datasets, Tensor | str):
        raise ValueError(
            f"{_OWNER}: datasets must be a list with a pair (training data, test data) for each "
            f"task, got {described(datasets)}"
        )
    pairs: list[tuple[Split, Split]] = []
    for number, pair in enumerate(datasets, start=1):
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(
                f"{_OWNER}: task {number} must be a pair (training data, test data), got "
                f"{described(pair)}"
            )
        whats = [f"{_OWNER}: task {number}, {kind} data" for kind in ("training", "test")]
        train, test = (_read(given, what) for given, what in zip(pair, whats, strict=True))
        pairs.append((train, test))
        for split, what in zip(pairs[-1], whats, strict=True):
            check_alike(what, split.inputs, pairs[0][0].inputs, _LIKE_FIRST)
    return _numbered(pairs, incremental)


def _numbered(pairs: list[tuple[Split, Split]], incremental: str) -> list[Task]:
    """The tasks with labels that are outputs of one model."""
    own = [train.labels.unique().tolist() for train, _ in pairs]
    everywhere = {label for classes in own for label in classes}
    tasks = []
    for number, ((train, test), classes, (block, outputs)) in enumerate(
        zip(pairs, own, numbered(_OWNER, own, incremental), strict=True), start=1
    ):
        # Domains share the classes.
        known, whose = (everywhere, "the") if incremental == "domain" else (set(classes), "its")
        strangers = set(test.labels.unique().tolist()) - known
        if strangers:
            raise ValueError(
                f"{_OWNER}: task {number}, test data: class {min(strangers)} is not among the "
                f"{len(known)} classes of {whose} training data"
            )
        if incremental != "domain":
            train, test = (_placed(split, classes, outputs) for split in (train, test))
        tasks.append(Task(f"task {number}", block, train, test))
    return tasks


def numbered(
    owner: str, classes: Sequence[list[int]], incremental: str
) -> list[tuple[range, list[int]]]:
    """For each task the model's outputs that are its own, and which are its classes.

    `classes` are the labels of each task, sorted. ValueError for negative ones of domains.
    """
    if incremental == "domain":
        for number, own in enumerate(classes, start=1):
            if own[0] < 0:
                raise ValueError(
                    f"{owner}: task {number}: label {own[0]}, expected numbers from 0 "
                    'where incremental="domain"'
                )
        return [(range(max(map(max, classes)) + 1), own) for own in classes]
    places: dict[int, int] = {}  # the output of each label
    used, found = 0, []
    for own in classes:
        if incremental == "task":
            places = {}
        for label in own:
            if label not in places:
                places[label], used = used, used + 1
        outputs = [places[label] for label in own]
        found.append((range(min(outputs), max(outputs) + 1), outputs))
    return found


def _placed(split: Split, classes: list[int], outputs: list[int]) -> Split:
    """The split with each of `classes`, which are sorted, as the output of the same place."""
    sorted_classes = torch.tensor(classes, device=split.labels.device)
    at = torch.searchsorted(sorted_classes, split.labels)
    return Split(split.inputs, torch.tensor(outputs, device=split.labels.device)[at])


def _read(given: Any, what: str) -> Split:  # noqa: ANN401  (whatever a user has)
    examples = _read_dataset(given, what) if isinstance(given, TorchDataset) else given
    if not isinstance(examples, tuple | list) or len(examples) != 2:
        raise ValueError(
            f"{what} are {described(given)}, expected a pair of tensors (inputs, labels) or a data "
            "set; each task is a pair (training data, test data), and loaders are for from_loaders"
        )
    check_examples(what, examples)
    inputs, labels = examples
    labels = class_labels(what, labels, len(inputs))
    if inputs.dtype == torch.uint8:
        raise ValueError(f"{what}: inputs are uint8; pass .float() / 255")
    if not bool(inputs.isfinite().all()):
        raise ValueError(f"{what}: inputs hold NaN or infinity")
    return Split(inputs.detach(), labels.detach())


def _read_dataset(dataset: TorchDataset[Any], what: str) -> tuple[Tensor, Tensor]:
    """All examples of a data set as two tensors."""
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
    if not batches:
        raise ValueError(f"{what} has no examples")
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels)
