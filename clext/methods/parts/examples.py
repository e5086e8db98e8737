"""The examples of a task as methods keep them: checked, on the device, with global labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core.modes import module_mode
from clext.importance.passes import check_labels, read_batches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clext.importance.passes import Batches
    from clext.methods.learning import Learning


def read_examples(method: Learning, dataloader: Batches | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a task on the model's device, with global labels (see `Outputs`).

    Raises:
        ValueError: they are not (x, y) batches, inputs are not finite, labels are outside the
            outputs or not those of the task, or nothing comes.
    """
    device = next(method.model.parameters()).device
    classes: int | None = None
    for inputs, labels in read_batches(method.name, dataloader, device):
        _refuse_non_finite(method.name, inputs)
        classes = classes or count_outputs(method, inputs)
        labels = check_labels(method.name, labels, classes)
        if len(method.outputs.blocks) > method.tasks:
            method.outputs.check_labels_of_task(method.name, labels)
        yield inputs.detach(), labels + method.outputs.start


def check_examples(method: Learning, examples: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and global labels of what `begin_task` was given; ValueError if it is no such."""
    return next(read_examples(method, [examples]))


def _refuse_non_finite(owner: str, inputs: Tensor) -> None:
    """What is kept is learned from in every later task, and one NaN would be in all of them."""
    if inputs.is_floating_point() and not bool((finite := inputs.isfinite()).all()):
        broken = len(inputs) - int(finite.flatten(1).all(dim=1).sum())
        raise ValueError(
            f"{owner}: {broken} of {len(inputs)} inputs hold NaN or infinity; leave these examples "
            "out of the task, or replace their values"
        )


def check_alike(
    owner: str, inputs: Tensor, known: Tensor, where: str, *, types: bool = True
) -> None:
    """ValueError unless inputs have the shape, and with `types` the type, of those known."""
    if inputs.shape[1:] != known.shape[1:] or (types and inputs.dtype != known.dtype):
        raise ValueError(
            f"{owner}: inputs are {inputs.dtype} {list(inputs.shape[1:])} each, expected "
            f"{known.dtype} {list(known.shape[1:])} as those {where}"
        )


def count_outputs(method: Learning, inputs: Tensor) -> int:
    """How many outputs are active; the model is asked where nobody has said."""
    active = method.outputs.active
    if active is not None:
        return len(active)
    with torch.no_grad(), module_mode(method.model, training=False):
        logits = method.model(inputs[:2])
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{method.name}: the model returned {got}, expected logits of shape [N, outputs]"
        )
    return logits.shape[1]
