"""Importance without data: Adam's average of squared gradients (arXiv:2507.18807)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from clext.core.lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.no_grad()
def second_moment(params: Sequence[Tensor], optimizer: object) -> list[Tensor]:
    """exp_avg_sq / (1 - beta2^step), the optimizer's own running mean of squared gradients.

    Each is the gradient of the *mean* of a batch of B samples, whose square is about 1/B of the
    mean square of single gradients where these are independent: importance is smaller than
    `fisher_information` by that much, and `strength` is to be B times as large. The mean reaches
    over about 1 / (1 - beta2) steps, and has all that the optimizer was given as a gradient: weight
    decay that is not decoupled, clipping, and the pull to an anchor (but a proximal one).

    Args:
        params: for which importance is wanted.
        optimizer: Adam, AdamW or another with "exp_avg_sq" in its state, of torch or of clext.

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype; zero where the
        optimizer has no state.

    Raises:
        ValueError: it is no optimizer, or has no second moment of any of these parameters.
    """
    wanted, found = {entry: i for i, entry in enumerate(params)}, False
    moments = [torch.zeros_like(entry, dtype=state_dtype(entry.dtype)) for entry in params]
    if isinstance(optimizer, Optimizer):
        for group in optimizer.param_groups:
            for entry in group["params"]:
                state = optimizer.state.get(entry, {})
                if entry in wanted and "exp_avg_sq" in state and state["step"] > 0:
                    correction = 1 - float(group["betas"][1]) ** float(state["step"])
                    moments[wanted[entry]].copy_(state["exp_avg_sq"]).div_(correction)
                    found = True
    if not found:
        raise ValueError(
            f'EWC(fisher="optimizer"): got {type(optimizer).__name__}, expected an optimizer with '
            "second moments (Adam, AdamW) that has stepped these parameters, in place of data: "
            "consolidate(optimizer)"
        )
    return moments
