"""Batches of a task's data, checked once where they come in: from a loader, or for a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Of (x, y), or where labels play no part x, (x,) or (x, ...): checked as they are read.
Batches = Iterable[Any]

_LABELS_REMEDY = (
    "pass y.squeeze(1) of a column, y.argmax(dim=1) of one-hot rows, y.long() of floats"
)


# ------------------------------------------------------------------ from a loader


def read_batches(
    owner: str, batches: Batches | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches (x, y) on `device`, without empty ones; ValueError if they are not such."""
    yield from ((x, y) for x, y in _read(owner, batches, device, 2, "(x, y)"))


def read_inputs(owner: str, batches: Batches | None, device: torch.device) -> Iterator[Tensor]:
    """The x on `device` of batches x, (x,) or (x, ...), of which the rest may be anything."""
    for (x,) in _read(owner, batches, device, 1, "x or (x, y)"):
        yield x


def read_examples(
    owner: str,
    batches: Batches | None,
    device: torch.device,
    classes: Callable[[Tensor], range],
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches (x, y) of a task on `device` for a method that keeps or replays examples.

    Args:
        owner: who reads them, for errors.
        batches: of the task, y [N] integers.
        device: of what is returned.
        classes: from the first inputs to the labels that may occur.
        start: is added to the labels: they count from the model's first output then.

    Raises:
        ValueError: they are not such, inputs are not finite (one NaN that is kept would be in every
            later task), labels are outside of `classes`, or nothing comes.
    """
    allowed: range | None = None
    for inputs, labels in read_batches(owner, batches, device):
        if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
            raise ValueError(f"{owner}: inputs hold NaN or infinity; leave these examples out")
        allowed = allowed or classes(inputs)
        yield inputs.detach(), class_labels(owner, labels, len(inputs), allowed) + start


def _read(
    owner: str, batches: Batches | None, device: torch.device, entries: int, form: str
) -> Iterator[list[Tensor]]:
    """The first entries of each batch, which has two if two are wanted."""
    remedy = "where there is a single batch, pass [(x, y)]"
    try:
        iterator = iter(batches)  # type: ignore[arg-type]  # that is the check
    except TypeError:
        iterator = None
    if iterator is None or _is_one_batch(batches):
        raise ValueError(
            f"{owner} needs the data of the task: got {described(batches)}, expected an iterable "
            f"of batches {form}; {remedy}"
        )
    is_empty = True
    for index, batch in enumerate(iterator):
        found = list(batch) if isinstance(batch, tuple | list) else [batch]
        if entries == 2 != len(found):
            raise ValueError(
                f"{owner}: batch {index} is {described(batch)}, expected a pair (x, y); {remedy}"
            )
        chosen = found[:entries] or [()]
        for name, entry in zip("xy", chosen, strict=False):
            if not isinstance(entry, Tensor) or entry.dim() == 0:
                raise ValueError(
                    f"{owner}: {name} of batch {index} is {described(entry)}, expected a tensor "
                    "with a row for each example (a model with other inputs can be made a module "
                    "that takes one tensor apart)"
                )
        if len(chosen[0]) != len(chosen[-1]):
            raise ValueError(
                f"{owner}: batch {index} has {len(chosen[0])} inputs but {len(chosen[1])} labels, "
                "expected one label per input"
            )
        if len(chosen[0]) > 0:
            is_empty = False
            # A graph cannot save inference tensors.
            yield [(e.clone() if e.is_inference() else e).to(device) for e in chosen]
    if is_empty:
        raise ValueError(f"{owner}: the data of the task is empty, expected at least one example")


def _is_one_batch(batches: object) -> bool:
    """Whether it is a tensor, or inputs and labels: batches of one loader do not differ so."""
    if not isinstance(batches, tuple | list):
        return isinstance(batches, Tensor)
    kinds = [(entry.dtype, entry.dim()) for entry in batches if isinstance(entry, Tensor)]
    return len(kinds) == len(batches) == 2 and kinds[0] != kinds[1]


# ------------------------------------------------------------------ for a loss


def checked_batch(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The arguments of a loss, with int64 labels. Waits for no device.

    Raises:
        TypeError: there are no inputs and labels, or something is no tensor.
        ValueError: nothing is in the batch, or something has not one row for each example.
    """
    if len(batch) < 2:
        raise TypeError(f"loss: got {len(batch)} arguments, expected inputs and labels: loss(x, y)")
    inputs, labels, *more = batch
    if not isinstance(inputs, Tensor) or inputs.dim() == 0:
        raise TypeError(
            f"loss: inputs x are {described(inputs)}, expected a tensor with a row for each "
            "example; for other inputs make the method of a module that takes one tensor apart"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"loss: labels y are {described(labels)}, expected a tensor; call torch.as_tensor(y)"
        )
    if len(inputs) == 0:
        raise ValueError(f"loss: inputs x are {described(inputs)}, expected at least one example")
    for place, entry in enumerate(more, start=3):
        if not isinstance(entry, Tensor) or entry.dim() == 0 or len(entry) != len(inputs):
            raise ValueError(
                f"loss: argument {place} is {described(entry)}, expected {len(inputs)} rows as the "
                "inputs x have; take the same rows of all that begin_task returned"
            )
    return inputs, class_labels("loss", labels, len(inputs)), *more


def labelled(owner: str, batch: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and labels; TypeError if there is more."""
    if len(batch) > 2:
        raise TypeError(
            f"loss: got {len(batch)} arguments, but {owner} takes inputs and labels alone: "
            "loss(x, y)"
        )
    inputs, labels = batch
    return inputs, labels


def added_logits(owner: str, batch: tuple[Tensor, ...]) -> Tensor | None:
    """What `begin_task` has added to inputs and labels, [N, outputs]; None if it is not there.

    TypeError if there is something else.
    """
    if len(batch) == 2:
        return None
    added = batch[2]
    if len(batch) > 3 or added.dim() != 2 or not added.is_floating_point():
        raise TypeError(
            f"loss: beside inputs and labels {owner} got {', '.join(map(described, batch[2:]))}, "
            "expected what begin_task has added: loss(x, y), or loss with the same rows of all "
            "that begin_task returned"
        )
    return added


# ------------------------------------------------------------------ checks of both


def class_labels(owner: str, labels: Tensor, samples: int, classes: range | None = None) -> Tensor:
    """`labels` as int64 if they are integers [samples], and with `classes` among these.

    ValueError otherwise. Without `classes` no value is looked at, so no device is waited for.
    """
    is_integer = not (
        labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool
    )
    if not is_integer or labels.shape != (samples,):
        raise ValueError(
            f"{owner}: labels y are {described(labels)}, expected integers [{samples}], a class "
            f"for each of the inputs x; {_LABELS_REMEDY}"
        )
    labels = labels.long()  # torch has no minimum for all types of integers
    if classes is not None:
        low, high = int(labels.min()), int(labels.max())
        if low < classes.start or high >= classes.stop:
            raise ValueError(
                f"{owner}: labels reach from {low} to {high}, expected {classes.start} to "
                f"{classes.stop - 1}: they count from the first active output"
            )
    return labels


def check_examples(owner: str, examples: object, classes: range | None = None) -> None:
    """ValueError unless they are inputs and labels of a whole task, and with `classes` of these."""
    pair = examples if isinstance(examples, tuple | list) and len(examples) == 2 else ()
    tensors = [entry for entry in pair if isinstance(entry, Tensor) and entry.dim() > 0]
    if len(tensors) < 2 or len(tensors[0]) != len(tensors[1]) or len(tensors[0]) == 0:
        got = ", ".join(map(described, pair)) or described(examples)
        raise ValueError(
            f"{owner}: examples are {got}, expected a pair of tensors, the inputs [N, ...] and "
            "labels [N] of the whole task, N > 0; make one of arrays by torch.as_tensor, of a "
            "loader by tuple(map(torch.cat, zip(*loader)))"
        )
    if classes is not None:
        class_labels(owner, tensors[1], len(tensors[0]), classes)


def check_alike(
    owner: str, inputs: Tensor, known: Tensor, where: str, *, types: bool = True
) -> None:
    """ValueError unless inputs have the shape, and with `types` the type, of those known."""
    if inputs.shape[1:] != known.shape[1:] or (types and inputs.dtype != known.dtype):
        raise ValueError(
            f"{owner}: inputs are {inputs.dtype} {list(inputs.shape[1:])} each, expected "
            f"{known.dtype} {list(known.shape[1:])} as those {where}"
        )


def owned(entry: Tensor) -> Tensor:
    """The tensor itself, or a copy if it is a part of a larger one, all of which it would hold."""
    is_whole = entry.untyped_storage().nbytes() == entry.nbytes
    return entry if is_whole else entry.clone()


def described(entry: object) -> str:
    """What was given, for errors."""
    if isinstance(entry, Tensor):
        return f"{entry.dtype} {list(entry.shape)}"
    size = f" of {len(entry)} entries" if isinstance(entry, tuple | list) else ""
    return "nothing" if entry is None else f"{type(entry).__name__}{size}"
