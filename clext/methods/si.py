"""Synaptic Intelligence (Zenke et al. 2017, arXiv:1703.04200)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch import nn

from clext.core.checks import SMALLEST, number
from clext.methods.base import Method

if TYPE_CHECKING:
    from clext.importance.passes import Batches


class SI(Method):
    """Importance: what a parameter contributed to the fall of the loss, per distance travelled.

    Along the task, path = -sum over steps of g * (step), g the gradient of the task loss alone: the
    penalty's share, 2 * strength * importance * (parameter - anchor), is taken out of `.grad`. At
    its end importance += max(0, path) / (distance^2 + xi), distance from the start of the task.
    (The paper's equation 5 has no max; an importance below 0 would reward going away.)

    `strength` at `update` must be the one that the gradient was made with.

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        xi: damping, > 0: keeps parameters that hardly moved from becoming all-important.
        clamp: what stays at least zero: each "task"'s share, max(0, path) / (distance^2 + xi), or
            the "total", importance = max(0, importance + path / (distance^2 + xi)), from which a
            task in which a parameter made the loss rise takes away (the authors' released code).
    """

    name: ClassVar[str] = "si"
    default_strength: ClassVar[float] = 20.0
    state_names: tuple[str, ...] = ("anchor", "importance", "path", "previous")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"clamp": ("task", "total")}
    keeps_by_pull: ClassVar[bool] = True
    fused_state: tuple[str, ...] | None = ("anchor", "importance", "path")
    separate_state: ClassVar[tuple[str, ...]] = ("previous",)

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        xi: float = 0.1,
        clamp: str = "task",
    ) -> None:
        super().__init__(model, strength=strength)
        self.xi = number(self.name, "xi", xi, minimum=SMALLEST)
        self.clamp = self._choice("clamp", clamp)

    def update(self) -> None:
        """Add a step to the path integral: after `optimizer.step()`, before `zero_grad()`.

        A step that a GradScaler has skipped leaves no trace.
        """
        super().update()
        try:
            self._state.plan.accumulate_path_integral_(self._strength, *self._take_scales())
        except (TypeError, ValueError) as error:
            raise self._explained(error) from None

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        self._refuse_broken("path")
        self._warn_if_zero("path")
        self._state.plan.consolidate_path_integral_(self.xi, self.clamp == "total")
        self._state.restart("previous")
