"""Tasks of a user's own data loaders, which are read batch by batch and never kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from clext.core.inputs import described, mapped
from clext.core.seeding import isolated_rng
from clext.data.own import numbered

_OWNER = "Scenario.from_loaders"
_CPU = torch.device("cpu")

# Of a batch the inputs and the labels, as `Supervision.inputs_and_labels` tells them.
Read = Callable[[Any], tuple[Any, Tensor | None]]


@dataclass(frozen=True, repr=False)
class LoaderTask:
    """One task whose examples loaders give.

    Args:
        name: as in errors.
        outputs: of the model, those that are the task's classes.
        train_loader: an iterable of batches, iterated anew in each epoch.
        test_loader: likewise, at each look at the task.
        labels: the classes that its batches have, sorted; None where they are outputs already.
        places: the output of each of these.
        device: where batches go.
    """

    name: str
    outputs: range
    train_loader: Iterable[Any]
    test_loader: Iterable[Any]
    labels: Tensor | None
    places: Tensor
    device: torch.device = _CPU

    def __repr__(self) -> str:
        outputs = f"outputs {self.outputs.start} to {self.outputs.stop - 1}"
        return f"Task {self.name!r}: data loaders, {outputs}"

    @property
    def classes(self) -> Collection[int]:
        """Its classes by their outputs."""
        found: list[int] = self.places.tolist()
        return found

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Not known; ValueError."""
        raise ValueError(
            f"train: of the loaders of {self.name} no example is known before the training; pass "
            "model, a torch.nn.Module"
        )

    def to(self, device: torch.device, *_: object) -> LoaderTask:
        """The same task with its batches on `device`; their types stay."""
        return replace(self, device=device)

    def train_batches(self, read: Read, start: int = 0, most: int | None = None) -> LoaderBatches:
        """Batches to train on, with labels that count from the output `start`.

        `most`: of a loader without a length, which may have no end.
        """
        return LoaderBatches(self, self.train_loader, read, start, most)

    def test_batches(self, read: Read) -> Generator[Any]:
        """Batches to test on, with global labels; torch's global generator stays as it is."""
        with isolated_rng(0, _CPU):  # a loader draws a seed from it each time it is iterated
            yield from LoaderBatches(self, self.test_loader, read)

    def local(self, batch: Any, read: Read, start: int) -> Any:  # noqa: ANN401
        """The batch, with its labels as outputs counted from `start`; where they are that, as it
        is.
        """
        if self.labels is None:
            return batch
        inputs, labels = read(batch)
        if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
            raise ValueError(
                f"{self.name}: labels of a batch are {described(labels)}, expected integers [N], a "
                "class for each example"
            )
        known, places = self.labels.to(labels.device), self.places.to(labels.device)
        at = torch.searchsorted(known, labels).clamp_(max=len(known) - 1)
        strange = labels[known[at] != labels]
        if len(strange):
            raise ValueError(
                f"{self.name}: a batch has label {int(strange[0])}, which is not among the classes "
                f"{known.tolist()} that {_OWNER} was given for the task"
            )
        return inputs, places[at] - start


class LoaderBatches:
    """The batches of a loader on the task's device; can be iterated as often as the loader."""

    def __init__(
        self,
        task: LoaderTask,
        loader: Iterable[Any],
        read: Read,
        start: int = 0,
        most: int | None = None,
    ) -> None:
        self._task, self._loader, self._read, self._start = task, loader, read, start
        self._most = None if _has_length(loader) else most

    def __iter__(self) -> Iterator[Any]:
        task, batch = self._task, None
        for batch in islice(self._loader, self._most):
            local = task.local(batch, self._read, self._start)
            yield mapped(lambda entry: entry.to(task.device, non_blocking=True), local)
        if batch is None:
            raise ValueError(f"{task.name}: a loader gave no batch, expected at least one")

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # TypeError where it has none, as there


def _has_length(loader: Iterable[Any]) -> bool:
    try:
        return len(loader) >= 0  # type: ignore[arg-type]  # a DataLoader tells when it is asked
    except TypeError:
        return False


def loader_tasks(
    loaders: Iterable[Any], classes: Iterable[Iterable[int]], incremental: str
) -> list[LoaderTask]:
    """The tasks of `Scenario.from_loaders`."""
    pairs, lists = list(loaders), [sorted(set(own)) for own in classes]
    if len(pairs) != len(lists) or not all(lists):
        raise ValueError(
            f"{_OWNER}: classes must be the labels of each of the {len(pairs)} tasks, such as "
            f"[[0, 1], [2, 3]] of two, got {lists}"
        )
    tasks = []
    for number, (pair, own, (block, places)) in enumerate(
        zip(pairs, lists, numbered(_OWNER, lists, incremental), strict=True), start=1
    ):
        train, test = _checked_pair(number, pair)
        labels = None if incremental == "domain" else torch.tensor(own)
        tasks.append(LoaderTask(f"task {number}", block, train, test, labels, torch.tensor(places)))
    return tasks


def _checked_pair(number: int, pair: Sequence[Any]) -> Sequence[Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(
            f"{_OWNER}: task {number} must be a pair (training loader, test loader), got "
            f"{described(pair)}"
        )
    for loader in pair:
        if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            raise ValueError(
                f"{_OWNER}: task {number}: expected loaders, which give their batches anew each "
                f"time they are iterated, got {described(loader)}; pass a DataLoader"
            )
    return pair
