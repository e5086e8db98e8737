"""Distillation: what a model has learned before, taught by the model as it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from clext.methods.parts.heads import Outputs

# How a distillation loss is scaled, the default first.
SCALES = ("squared", "mean", "none")


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float, scale: str) -> Tensor:
    """Cross entropy between the softened probabilities of a teacher and those of the model, 0-dim.

    T^2 * mean over examples of -sum_c p_c log q_c with p = softmax(teacher / T) and
    q = softmax(logits / T) (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        logits: of the model, [N, classes].
        teacher: its logits, [N, classes that it knew], the first of those above; to the rest it
            gives the probability zero.
        temperature: T > 0.
        scale: "squared" as above, so that gradients do not shrink with T; "mean": T^2 divided by
            the number of classes; "none": without T^2.
    """
    # A sum of logarithms in bfloat16 would have two digits left.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.softmax(teacher.to(logits.dtype) / temperature, dim=1)
    log_probabilities = torch.log_softmax(logits / temperature, dim=1)
    loss = -(targets * log_probabilities[:, : teacher.shape[1]]).sum(dim=1).mean()
    if scale == "none":
        return loss
    return loss * (temperature**2 / (logits.shape[1] if scale == "mean" else 1))


def old_heads(outputs: Outputs, ended: int, known: int) -> list[tuple[slice, slice]]:
    """The outputs that examples of earlier tasks are told apart by.

    Args:
        outputs: of the model.
        ended: tasks ended so far.
        known: how many outputs the model had then.

    Returns:
        For each head of the earlier tasks (one for all of them, but where each task has its own)
        the model's outputs that compete in it now, and those of them that did at the end of the
        last task.
    """
    earlier, active = outputs.blocks[:ended], outputs.active
    if active is None:
        return [(slice(None), slice(0, known))]
    tops: dict[range, int] = {}
    for block in earlier:
        inside = active.start <= block.start and block.stop <= active.stop
        head = active if inside else block
        tops[head] = max(tops.get(head, 0), block.stop)
    return [
        (slice(head.start, head.stop), slice(head.start, min(top, known)))
        for head, top in tops.items()
    ]
