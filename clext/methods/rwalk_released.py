"""Intervals and tasks of Riemannian Walk as in the code that its authors released (see `RWalk`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clext import ops
from clext.reference.arithmetic import maximum

if TYPE_CHECKING:
    from torch import Tensor

    from clext.state import ParameterState


@torch.no_grad()
def close_interval(state: ParameterState, decay: float, intervals: float, eps: float) -> None:
    """The interval's entry of the score, by the old Fisher average, which then takes the squares.

    "fisher" holds their mean since the task began, `intervals` is how many intervals that was.
    """
    lists = state.lists
    # The op halves it.
    twice = torch._foreach_mul(lists["running_fisher"], 2.0)
    ops.accumulate_riemannian_walk_score_(
        lists["task_score"], lists["path"], lists["interval_start"], twice, state.params, eps
    )
    torch._foreach_mul_(lists["running_fisher"], 1 - decay)
    torch._foreach_add_(lists["running_fisher"], lists["fisher"], alpha=decay * intervals)


@torch.no_grad()
def drop_interval(state: ParameterState) -> None:
    """Forget what a task's last interval has so far, and the task's squares."""
    torch._foreach_zero_(state.lists["path"])
    torch._foreach_zero_(state.lists["fisher"])


@torch.no_grad()
def consolidate(state: ParameterState, mix: float, *, is_first: bool) -> None:
    """Merge the scores; importance and anchor for the next task."""
    lists = state.lists
    score, task_score = lists["score"], lists["task_score"]
    torch._foreach_mul_(score, 0.0 if is_first else 2.0 - mix)
    torch._foreach_add_(score, task_score, alpha=1.0 if is_first else mix)
    torch._foreach_zero_(task_score)
    scaled = torch._foreach_add(_to_unit_range(lists["running_fisher"]), _to_unit_range(score))
    torch._foreach_copy_(lists["importance"], scaled)
    state.restart("anchor")


def _to_unit_range(tensors: list[Tensor]) -> list[Tensor]:
    """(x - min) / (max - min) over all of them; 0 where they are all the same."""
    lowest = -maximum([-entry for entry in tensors])
    span = maximum(tensors) - lowest
    span = torch.where(span == 0, torch.inf, span)
    return [(entry - lowest) / span for entry in tensors]
