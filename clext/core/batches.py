"""Batches of a task's data, checked once where they come in, and the examples of a whole task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from clext.core.inputs import Inputs, described, flatten, mapped, rows
from clext.core.likelihood import integers

# What a loader gives: see `clext.core.supervision.Supervision`.
Batches = Iterable[Any]


def read_batches(owner: str, batches: Batches | None, device: torch.device) -> Iterator[Any]:
    """The batches as they are, their tensors on `device`, without empty ones.

    ValueError if it is no iterable of such.
    """
    remedy = "where there is a single batch, pass [(x, y)]"
    if _gives_single_samples(batches):
        raise ValueError(
            f"{owner} needs batches, and a {type(batches).__name__} gives single samples; pass a "
            "torch.utils.data.DataLoader of it"
        )
    try:
        iterator = iter(batches)  # type: ignore[arg-type]  # that is the check
    except TypeError:
        iterator = None
    if iterator is None or _is_one_batch(batches):
        raise ValueError(
            f"{owner} needs the data of the task: got {described(batches)}, expected an iterable "
            f"of batches x or (x, y), or of mappings; {remedy}"
        )
    is_empty = True
    for index, batch in enumerate(iterator):
        tensors, _ = flatten(batch)
        if not tensors:
            raise ValueError(
                f"{owner}: batch {index} is {described(batch)}, expected tensors with a row for "
                f"each example; {remedy}"
            )
        if any(len(entry) > 0 for entry in tensors):
            is_empty = False
            # A graph cannot save inference tensors.
            yield mapped(lambda e: (e.clone() if e.is_inference() else e).to(device), batch)
    if is_empty:
        raise ValueError(f"{owner}: the data of the task is empty, expected at least one example")


def _gives_single_samples(batches: object) -> bool:
    return isinstance(batches, Dataset) and not isinstance(batches, IterableDataset)


def _is_one_batch(batches: object) -> bool:
    """Whether it is a tensor, a mapping, or inputs and labels: batches of one loader do not differ
    so.
    """
    if not isinstance(batches, tuple | list):
        return isinstance(batches, Tensor | Mapping)
    kinds = [(entry.dtype, entry.dim()) for entry in batches if isinstance(entry, Tensor)]
    return len(kinds) == len(batches) == 2 and kinds[0] != kinds[1]


# ------------------------------------------------------------------ of a whole task


def class_labels(owner: str, labels: Tensor, samples: int, classes: range | None = None) -> Tensor:
    """`labels` as int64 if they are integers [samples], and with `classes` among these.

    ValueError otherwise. Without `classes` no value is looked at, so no device is waited for.
    """
    labels = integers(owner, labels)
    if labels.shape != (samples,):
        raise ValueError(
            f"{owner}: labels y are {described(labels)}, expected integers [{samples}], a class "
            "for each of the inputs x; pass y.squeeze(1) of a column"
        )
    if classes is not None:
        low, high = int(labels.min()), int(labels.max())
        if low < classes.start or high >= classes.stop:
            raise ValueError(
                f"{owner}: labels reach from {low} to {high}, expected {classes.start} to "
                f"{classes.stop - 1}: they count from the first active output"
            )
    return labels


def added_logits(samples: int, more: Sequence[object]) -> Tensor | None:
    """What `begin_task` has added to inputs and labels, [N, outputs]; None if it is not there."""
    found = more[0] if more else None
    if not isinstance(found, Tensor) or found.dim() != 2 or not found.is_floating_point():
        return None
    if len(found) != samples:
        raise ValueError(
            f"loss: argument 3 is {described(found)}, expected {samples} rows as the inputs have; "
            "take the same rows of all that begin_task returned"
        )
    return found


def check_examples(owner: str, examples: object, classes: range | None = None) -> None:
    """ValueError unless they are inputs and labels of a whole task, and with `classes` of these."""
    pair = list(examples) if isinstance(examples, tuple | list) and len(examples) == 2 else []
    counts = [{len(tensor) for tensor in flatten(entry)[0]} for entry in pair]
    if not counts or counts[0] != counts[1] or len(counts[0]) != 1 or counts[0] == {0}:
        got = ", ".join(map(described, pair)) or described(examples)
        raise ValueError(
            f"{owner}: examples are {got}, expected a pair of tensors, the inputs [N, ...] and "
            "labels [N] of the whole task, N > 0; make one of arrays by torch.as_tensor, of a "
            "loader by tuple(map(torch.cat, zip(*loader)))"
        )
    if classes is not None:
        class_labels(owner, pair[1], rows(pair[0]), classes)


def check_alike(
    owner: str,
    inputs: Inputs,
    known: Inputs,
    where: str,
    what: str = "inputs",
    *,
    types: bool = True,
) -> None:
    """ValueError unless inputs have the shapes, and with `types` the types, of those known."""
    mine, theirs = (
        [(entry.shape[1:], entry.dtype if types else None) for entry in flatten(given)[0]]
        for given in (inputs, known)
    )
    if mine != theirs:
        got, wanted = (
            ", ".join(f"{entry.dtype} {list(entry.shape[1:])}" for entry in flatten(given)[0])
            for given in (inputs, known)
        )
        raise ValueError(
            f"{owner}: {what} are {got} each, expected {wanted} as those {where}; what differs in "
            "length has to be padded to one"
        )


def owned(inputs: Inputs) -> Inputs:
    """The tensors themselves, or copies of parts of larger ones, all of which they would hold."""
    return mapped(lambda e: e if e.untyped_storage().nbytes() == e.nbytes else e.clone(), inputs)
