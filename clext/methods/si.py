"""Synaptic Intelligence (Zenke et al. 2017, arXiv:1703.04200)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from clext.core.checks import SMALLEST, number
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.supervision import SupervisionOptions


class SI(QuadraticPenalty):
    """Importance: what a parameter contributed to the fall of the loss, per distance travelled.

    Along the task, path -= g * (parameter - parameter before the step), with g the gradient of the
    task's loss alone, without the penalty and before any clipping. At its end

        importance += max(0, path) / (distance^2 + xi),  path = 0,

    with the distance from the start of the task, where the anchor is until then. (The paper's
    equation 5 has no max; an importance below 0 would reward going away.)

    Args:
        model: see `Method`.
        strength: weight of the penalty.
        xi: damping, > 0: keeps parameters that hardly moved from becoming all-important.
        clamp: what stays at least zero: each "task"'s share, max(0, path) / (distance^2 + xi), or
            the "total", importance = max(0, importance + path / (distance^2 + xi)), from which a
            task in which a parameter made the loss rise takes away (the authors' released code).
        state_dtype: of anchor and importance; see `QuadraticPenalty`.
    """

    name: ClassVar[str] = "si"
    default_strength: ClassVar[float] = 20.0
    state_names: tuple[str, ...] = ("anchor", "importance", "path")
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"clamp": ("task", "total")}
    needs_first_task: bool = True
    fused: tuple[str, ...] | None = ("anchor", "importance", "path")

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        xi: float = 0.1,
        clamp: str = "task",
        state_dtype: torch.dtype | str | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, state_dtype=state_dtype, **supervision)
        self.xi = number(self.name, "xi", xi, minimum=SMALLEST)
        self.clamp = self._choice("clamp", clamp)

    def _follow_step(self) -> None:
        # path -= task_gradient * (parameter - step_start)
        self._state.plan.accumulate_path_integral_()

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        self._state.check_finite(self.name, ["path"])
        # importance += max(0, path) / ((parameter - anchor)^2 + xi); anchor = parameter; path = 0
        self._state.plan.consolidate_path_integral_(self.xi, self.clamp == "total")
