"""The examples of a task as methods keep them: checked, on the device, with global labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core import batches
from clext.core.batches import check_alike as check_alike
from clext.core.modes import module_mode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clext.core.batches import Batches
    from clext.methods.learning import Learning


def read_examples(method: Learning, dataloader: Batches | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of a task on the model's device, with global labels (see `Outputs`).

    Raises:
        ValueError: they are not (x, y) batches, inputs are not finite, labels are outside the
            outputs or not those of the task, or nothing comes.
    """
    device = next(method.model.parameters()).device

    def classes(inputs: Tensor) -> range:
        outputs = method.outputs
        if len(outputs.blocks) > method.tasks:  # the task has said which are its own
            block = outputs.blocks[-1]
            return range(block.start - outputs.start, block.stop - outputs.start)
        return range(count_outputs(method, inputs))

    yield from batches.read_examples(method.name, dataloader, device, classes, method.outputs.start)


def check_examples(method: Learning, examples: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Inputs and global labels of what `begin_task` was given; ValueError if it is no such."""
    return next(read_examples(method, [examples]))


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
