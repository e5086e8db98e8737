"""The formulas of Riemannian Walk: those of its paper, those of the released code (see `RWalk`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from clext import ops
from clext.ops.reference.arithmetic import maximum

if TYPE_CHECKING:
    from torch import Tensor

    from clext.methods.rwalk import RWalk


class PaperFormulas:
    """Those that the fused ops have."""

    head_start = 0  # steps that a task's first interval lacks

    def declare(self, walk: RWalk) -> None:
        """Name what is kept beside the state of these formulas, before it is made."""

    def step_decay(self, walk: RWalk) -> float:
        """Weight of the old average of squared gradients at the next step."""
        return 1.0 - walk.alpha

    def close_interval(self, walk: RWalk) -> None:
        """Enter the interval in the score."""
        walk._state.plan.accumulate_riemannian_walk_score_(walk.eps)

    def close_last_interval(self, walk: RWalk) -> None:
        """What a task's end makes of an interval that lacks steps."""
        if walk.interval_steps > 0:
            self.close_interval(walk)

    def consolidate(self, walk: RWalk) -> None:
        """Merge the scores; importance and anchor for the next task."""
        walk._state.plan.consolidate_riemannian_walk_(1.0 if walk.tasks == 0 else walk.mix)


class ReleasedFormulas(PaperFormulas):
    """Those of the released code: "fisher" is the mean of the squares since the task began."""

    head_start = 1  # there an interval ends ahead of the step that would complete it

    def declare(self, walk: RWalk) -> None:
        """A Fisher average beside the squares, and how many squares these are."""
        walk.state_names = (*walk.state_names, "running_fisher")
        walk.counter_names = (*walk.counter_names, "task_steps")
        walk.fused_state = None  # the weight of a step changes with each

    def step_decay(self, walk: RWalk) -> float:
        """That of a plain mean."""
        return walk.task_steps / (walk.task_steps + 1)

    @torch.no_grad()
    def close_interval(self, walk: RWalk) -> None:
        """By the old Fisher average, which then takes the sum of the squares per `interval`."""
        lists = walk._state.lists
        running, squares = lists["running_fisher"], lists["fisher"]
        # The op halves it.
        twice = torch._foreach_mul(running, 2.0)
        ops.accumulate_riemannian_walk_score_(
            lists["task_score"],
            lists["path"],
            lists["interval_start"],
            twice,
            walk._state.params,
            walk.eps,
        )
        torch._foreach_mul_(running, 1 - walk.alpha)
        torch._foreach_add_(running, squares, alpha=walk.alpha * walk.task_steps / walk.interval)

    @torch.no_grad()
    def close_last_interval(self, walk: RWalk) -> None:
        """Drop it, and the task's squares."""
        torch._foreach_zero_(walk._state.lists["path"])
        torch._foreach_zero_(walk._state.lists["fisher"])

    @torch.no_grad()
    def consolidate(self, walk: RWalk) -> None:
        """The old score stays and is merged; by the minimum as well as the maximum."""
        lists, is_first = walk._state.lists, walk.tasks == 0
        score, task_score = lists["score"], lists["task_score"]
        torch._foreach_mul_(score, 0.0 if is_first else 2.0 - walk.mix)
        torch._foreach_add_(score, task_score, alpha=1.0 if is_first else walk.mix)
        torch._foreach_zero_(task_score)
        scaled = torch._foreach_add(_to_unit_range(lists["running_fisher"]), _to_unit_range(score))
        torch._foreach_copy_(lists["importance"], scaled)
        walk._state.restart("anchor")


FORMULAS = {"paper": PaperFormulas(), "released": ReleasedFormulas()}


def _to_unit_range(tensors: list[Tensor]) -> list[Tensor]:
    """(x - min) / (max - min) over all of them; 0 where they are all the same."""
    lowest = -maximum([-entry for entry in tensors])
    span = maximum(tensors) - lowest
    span = torch.where(span == 0, torch.inf, span)
    return [(entry - lowest) / span for entry in tensors]
