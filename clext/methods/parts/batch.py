"""What `loss` is given, looked at before a method draws, learns or changes anything."""

from __future__ import annotations

import torch
from torch import Tensor


def checked_batch(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The batch with int64 labels; what it takes to know that waits for no device.

    Raises:
        TypeError: there are no inputs and labels, or something is no tensor.
        ValueError: nothing is in the batch, or something has not one row for each example.
    """
    if len(batch) < 2:
        raise TypeError(f"loss: got {len(batch)} arguments, expected inputs and labels: loss(x, y)")
    inputs, labels, *more = batch
    if not isinstance(inputs, Tensor) or inputs.dim() == 0:
        raise TypeError(
            f"loss: inputs x are {_described(inputs)}, expected a tensor with a row for each "
            "example; for a model with other inputs make the method of a module that takes one "
            "tensor apart for it"
        )
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"loss: labels y are {_described(labels)}, expected a tensor of {len(inputs)} "
            "integers; call torch.as_tensor(y)"
        )
    if len(inputs) == 0:
        raise ValueError(
            f"loss: inputs x are {_described(inputs)}, expected at least one example; leave "
            "empty batches out"
        )
    if not _is_integer(labels) or labels.dim() != 1 or len(labels) != len(inputs):
        raise ValueError(
            f"loss: labels y are {_described(labels)}, expected integers [{len(inputs)}], a class "
            f"for each of the inputs x; {_remedy(inputs, labels)}"
        )
    for place, entry in enumerate(more, start=3):
        if not isinstance(entry, Tensor) or entry.dim() == 0 or len(entry) != len(inputs):
            raise ValueError(
                f"loss: argument {place} is {_described(entry)}, expected {len(inputs)} rows as "
                "the inputs x have; take the same rows of all that begin_task returned"
            )
    return inputs, labels.long(), *more


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
        got = ", ".join(_described(entry) for entry in batch[2:])
        raise TypeError(
            f"loss: beside inputs and labels {owner} got {got}, expected a row for each example of "
            "what begin_task has added: loss(x, y), or loss with the same rows of all that "
            "begin_task returned"
        )
    return added


def check_examples_of_task(owner: str, examples: object) -> None:
    """ValueError unless they are inputs and labels, one for each, of a whole task."""
    entries = examples if isinstance(examples, tuple | list) and len(examples) == 2 else ()
    tensors = [entry for entry in entries if isinstance(entry, Tensor) and entry.dim() > 0]
    if len(tensors) < 2 or len(tensors[0]) != len(tensors[1]) or len(tensors[0]) == 0:
        got = ", ".join(_described(entry) for entry in entries) or _described(examples)
        raise ValueError(
            f"{owner}: examples for begin_task are {got}, expected a pair of tensors, the inputs "
            "[N, ...] and labels [N] of the whole task, which must not be empty; of a loader: "
            "tuple(map(torch.cat, zip(*loader)))"
        )


def _is_integer(labels: Tensor) -> bool:
    return not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)


def _described(entry: object) -> str:
    if not isinstance(entry, Tensor):
        return f"of type {type(entry).__name__}"
    return f"{entry.dtype} {list(entry.shape)}"


def _remedy(inputs: Tensor, labels: Tensor) -> str:
    """How to get labels out of what was given."""
    columns = labels.shape[1] if labels.dim() == 2 else 0
    seem_swapped = inputs.dim() == 1 and not inputs.is_floating_point()
    if seem_swapped and (columns > 1 or labels.dim() > 2 or labels.is_floating_point()):
        return "it seems that they are swapped: call loss(x, y)"
    if labels.dim() not in (1, 2) or len(labels) != len(inputs):
        return "take inputs and labels of the same examples"
    if columns > 1:
        return "if they are a column for each class, pass y.argmax(dim=1)"
    squeezed = "y.squeeze(1)" if columns else "y"
    return f"pass {squeezed}" if _is_integer(labels) else f"pass {squeezed}.long()"
