"""Riemannian Walk (Chaudhry et al. 2018, arXiv:1801.10112)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from clext import ops
from clext.core.checks import SMALLEST, integer, number
from clext.methods.parts.state import COPIES_OF_PARAMETERS
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.supervision import SupervisionOptions


class RWalk(QuadraticPenalty):
    """Importance: Fisher information plus a path-integral score, each scaled to [0, 1].

    Fisher is the moving average of the squared task gradient, F = alpha * g^2 + (1 - alpha) * F at
    every step of every task (equation 6 of the paper). The score of a task adds, every `interval`
    steps,

        max(0, fall of the loss) / (F * distance^2 / 2 + eps),

    the fall being the path integral over the interval (as in SI, of the task's gradient alone) and
    the distance its length: the loss decrease per distance in KL divergence. At the end of a
    task (which closes its last interval) score = (1 - mix) * score + mix * the task's score, the
    task's own at the first task, and importance = F / max F + score / max score.

    variant="released" follows the formulas of the code that the authors released, which differ:

    - F is averaged over intervals: with S the sum of g^2 over all steps since the task began, at
      the end of each F = alpha * S / interval + (1 - alpha) * F. S is not begun again with each
      interval, so that F weighs all steps of a task about alike instead of the last `interval` of
      them alone;
    - an interval's score is max(0, fall) / (F * distance^2 + eps), F without that interval;
    - a task's first interval is a step shorter, and its last one is dropped, score and squares
      alike, if it lacks steps;
    - score = (2 - mix) * score + mix * the task's score, the task's own at the first task;
    - F and score are each scaled to [0, 1] by (x - min) / (max - min).

    An optimizer of `clext.optim` calls this variant around its step rather than in its pass.

    The steps of every optimizer that has this method are counted: use param groups of one.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        alpha: weight of the new squares in the Fisher average, in (0, 1].
        interval: steps between two entries of the score, >= 1.
        eps: damping of the score, > 0.
        mix: weight of the new task's score, in [0, 1].
        variant: the formulas of the "paper", or those of the "released" code.
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "rwalk"
    default_strength: ClassVar[float] = 1.0
    state_names: tuple[str, ...] = (
        "anchor",
        "importance",
        "path",
        "fisher",
        "task_score",
        "score",
        "interval_start",
    )
    counter_names: tuple[str, ...] = ("tasks", "steps", "interval_steps")
    needs_first_task: bool = True
    fused: tuple[str, ...] | None = ("anchor", "importance", "path", "fisher")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"variant": ("paper", "released")}

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        alpha: float = 0.9,
        interval: int = 10,
        eps: float = 1e-3,
        mix: float = 0.5,
        variant: str = "paper",
        state_dtype: torch.dtype | str | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        self.variant = self._choice("variant", variant)
        self._is_released = self.variant == "released"
        if self._is_released:
            # "fisher" is then the mean of the squares since the task began, "running_fisher" F; the
            # weight of a step changes with each, so no optimizer's pass can do it.
            self.state_names = (*self.state_names, "running_fisher")
            self.counter_names = (*self.counter_names, "task_steps")
            self.fused = None
        super().__init__(model, strength=strength, state_dtype=state_dtype, **supervision)
        self.alpha = number(self.name, "alpha", alpha, minimum=SMALLEST, maximum=1.0)
        self.interval = integer(self.name, "interval", interval, minimum=1)
        self.eps = number(self.name, "eps", eps, minimum=SMALLEST)
        self.mix = number(self.name, "mix", mix, minimum=0.0, maximum=1.0)
        self._begin_counts()

    def _begin_counts(self) -> None:
        # Released: an interval ends ahead of the step that would complete it.
        self.interval_steps = 1 if self._is_released else 0  # since the interval began
        self.task_steps = 0  # since the task began

    @property
    def decay(self) -> float:  # type: ignore[override]
        """Weight of the old average of squared gradients at the next step."""
        if self._is_released:
            return self.task_steps / (self.task_steps + 1)  # that of a plain mean
        return 1.0 - self.alpha

    def _follow_step(self) -> None:
        # path -= task_gradient * (parameter - step_start)
        # fisher = decay * fisher + (1 - decay) * task_gradient^2
        self._state.plan.riemannian_walk_step_(self.decay)

    def _after_step(self) -> None:
        self.interval_steps += 1
        self.task_steps += 1
        if self.interval_steps >= self.interval:
            self._close_interval()
            self.interval_steps = 0

    def _close_interval(self) -> None:
        if self._is_released:
            _close_released_interval(self)
        else:
            # task_score += max(0, path) / (fisher * (parameter - interval_start)^2 / 2 + eps)
            self._state.plan.accumulate_riemannian_walk_score_(self.eps)

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        keys = [key for key in self.state_names if key not in COPIES_OF_PARAMETERS]
        self._state.check_finite(self.name, keys)
        if self._is_released:
            _end_released_task(self)
        else:
            if self.interval_steps > 0:
                self._close_interval()
            # score = (1 - mix) * score + mix * task_score
            # importance = fisher / max fisher + score / max score; anchor = parameter
            self._state.plan.consolidate_riemannian_walk_(1.0 if self.tasks == 0 else self.mix)
        self._state.restart("interval_start")  # the walk goes on from where it is now
        self._begin_counts()


# ---------------------------------------------------------------------- variant="released"


@torch.no_grad()
def _close_released_interval(walk: RWalk) -> None:
    """Enter the interval by the old F, which then takes the sum of the squares per `interval`."""
    lists = walk._state.lists
    running, squares = lists["running_fisher"], lists["fisher"]
    ops.accumulate_riemannian_walk_score_(
        lists["task_score"],
        lists["path"],
        lists["interval_start"],
        torch._foreach_mul(running, 2.0),  # the op halves it
        walk._state.local,
        walk.eps,
    )
    torch._foreach_mul_(running, 1 - walk.alpha)
    torch._foreach_add_(running, squares, alpha=walk.alpha * walk.task_steps / walk.interval)


@torch.no_grad()
def _end_released_task(walk: RWalk) -> None:
    """Drop the last interval and the task's squares; the old score stays and is merged."""
    lists, is_first = walk._state.lists, walk.tasks == 0
    score, task_score = lists["score"], lists["task_score"]
    torch._foreach_mul_(score, 0.0 if is_first else 2.0 - walk.mix)
    torch._foreach_add_(score, task_score, alpha=1.0 if is_first else walk.mix)
    for key in ("path", "fisher", "task_score"):
        torch._foreach_zero_(lists[key])
    running, largest = lists["running_fisher"], walk._state.largest
    scaled = torch._foreach_add(_to_unit_range(running, largest), _to_unit_range(score, largest))
    torch._foreach_copy_(lists["importance"], scaled)
    walk._state.restart("anchor")


def _to_unit_range(
    tensors: list[Tensor], largest: Callable[[list[Tensor]], Tensor]
) -> list[Tensor]:
    """(x - min) / (max - min) over all of them; 0 where they are all the same."""
    lowest = -largest([-entry for entry in tensors])
    span = largest(tensors) - lowest
    span = torch.where(span == 0, torch.inf, span)
    return [(entry - lowest) / span for entry in tensors]
