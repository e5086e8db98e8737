"""Clipping that remembers what it did."""

from __future__ import annotations

import math
from numbers import Real
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from clext.core.lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def _is_number(value: object) -> TypeGuard[float]:
    return type(value) is not bool and isinstance(value, Real)


def check_clipping(owner: str, max_norm: object, norm_type: object) -> None:
    """ValueError unless they are a number >= 0 and one > 0; infinity is one."""
    if not _is_number(max_norm) or not max_norm >= 0:
        raise ValueError(f"{owner}: max_norm must be a number >= 0, got {max_norm!r}")
    if not _is_number(norm_type) or not norm_type > 0:
        raise ValueError(f"{owner}: norm_type must be a number > 0 or inf, got {norm_type!r}")


@torch.no_grad()
def clip_grads_(
    params: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> tuple[Tensor, Tensor]:
    """`torch.nn.utils.clip_grad_norm_`; the total norm, and what gradients were multiplied with.

    Both are 0-dim and on the device; the factor is float32 or float64.
    """
    chosen = [entry for entry in params if entry.grad is not None]
    grads = [entry.grad for entry in chosen if entry.grad is not None]
    norm = get_total_norm(grads, norm_type, error_if_nonfinite)
    if max_norm == math.inf:  # in torch infinity over infinity: all gradients would be NaN
        return norm, torch.ones((), device=params[0].device, dtype=state_dtype(norm.dtype))
    clip_grads_with_norm_(chosen, max_norm, norm)
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as in torch, in the dtype of the norm
    return norm, factor.to(params[0].device, state_dtype(factor.dtype))
