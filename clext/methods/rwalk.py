"""Riemannian Walk (Chaudhry et al. 2018, arXiv:1801.10112)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from clext.core.checks import SMALLEST, integer, number
from clext.methods.base import Method
from clext.methods.parts.state import COPIES_OF_PARAMETERS
from clext.methods.rwalk_formulas import FORMULAS

if TYPE_CHECKING:
    from clext.importance.passes import Batches


class RWalk(Method):
    """Importance: Fisher information plus a path-integral score, each scaled to [0, 1].

    Fisher is the moving average of the squared task gradient, F = alpha * g^2 + (1 - alpha) * F at
    every step of every task (equation 6 of the paper). The score of a task adds, every `interval`
    steps,

        max(0, fall of the loss) / (F * distance^2 / 2 + eps),

    the fall being the path integral over the interval (as in SI, the penalty's gradient taken out)
    and the distance its length: the loss decrease per distance in KL divergence. At the end of a
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

    `strength` at `update` must be the one that the gradient was made with. Of several optimizers
    that were given this method the steps of each are counted: use param groups of one.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        alpha: weight of the new squares in the Fisher average, in (0, 1].
        interval: steps between two entries of the score, >= 1.
        eps: damping of the score, > 0.
        mix: weight of the new task's score, in [0, 1].
        variant: the formulas of the "paper", or those of the "released" code.
    """

    name: ClassVar[str] = "rwalk"
    default_strength: ClassVar[float] = 1.0
    state_names: tuple[str, ...] = (
        "anchor",
        "importance",
        "path",
        "previous",
        "fisher",
        "task_score",
        "score",
        "interval_start",
    )
    counter_names: tuple[str, ...] = ("tasks", "interval_steps")
    keeps_by_pull: ClassVar[bool] = True
    fused_state: tuple[str, ...] | None = ("anchor", "importance", "path", "fisher")
    separate_state: ClassVar[tuple[str, ...]] = ("previous",)
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
    ) -> None:
        self.variant = self._choice("variant", variant)
        self._formulas = FORMULAS[self.variant]
        self._formulas.declare(self)
        super().__init__(model, strength=strength)
        self.alpha = number(self.name, "alpha", alpha, minimum=SMALLEST, maximum=1.0)
        self.interval = integer(self.name, "interval", interval, minimum=1)
        self.eps = number(self.name, "eps", eps, minimum=SMALLEST)
        self.mix = number(self.name, "mix", mix, minimum=0.0, maximum=1.0)
        self.interval_steps = self._formulas.head_start  # since the interval began
        self.task_steps = 0  # since the task began

    def update(self) -> None:
        """Follow a step: after `optimizer.step()`, before `zero_grad()`.

        A step that a GradScaler has skipped is counted. Where its gradient is not finite it leaves
        no other trace; what was finite of it is averaged into Fisher.
        """
        super().update()
        decay = self._formulas.step_decay(self)
        try:
            self._state.plan.riemannian_walk_step_(self._strength, decay, *self._take_scales())
        except (TypeError, ValueError) as error:
            raise self._explained(error) from None
        self.after_step()

    def after_step(self) -> None:
        """Count the step, and close the interval with its last one."""
        self.interval_steps += 1
        self.task_steps += 1
        if self.interval_steps >= self.interval:
            self._formulas.close_interval(self)
            self.interval_steps = 0

    def step_options(self) -> dict[str, float]:
        """Numbers that the optimizer's pass needs."""
        return {"strength": self._strength, "decay": self._formulas.step_decay(self)}

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        self._refuse_broken(*(key for key in self.state_names if key not in COPIES_OF_PARAMETERS))
        self._formulas.close_last_interval(self)
        self.interval_steps, self.task_steps = self._formulas.head_start, 0
        self._warn_if_zero("task_score")
        self._formulas.consolidate(self)
        # The path is empty since its interval was closed; the walk goes on from where it is now.
        self._state.restart("previous")
        self._state.restart("interval_start")
