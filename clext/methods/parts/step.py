"""The step under way: what is kept of it from the pull to its end."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

from clext import ops
from clext.core.sharding import local
from clext.methods.parts.state import ALL_FROZEN

if TYPE_CHECKING:
    from torch import Tensor

    from clext.methods.parts.state import ParameterState


class _Mark(NamedTuple):
    """The first gradient that there is, and how often it had been written."""

    place: int
    gradient: weakref.ref[Tensor]
    writes: int

    def is_same(self, other: _Mark | None) -> bool:
        """Whether it is that gradient still, and was not written since."""
        return (
            other is not None
            and self.gradient() is other.gradient()
            and self.writes == other.writes
        )


def _mark(state: ParameterState) -> _Mark | None:
    for place, entry in enumerate(state.params):
        if entry.grad is not None:
            gradient = local(entry.grad) if state.is_sharded else entry.grad
            return _Mark(place, weakref.ref(gradient), gradient._version)
    return None


class Step:
    """Where a step began, by which gradient of the task, and which gradients hold its pull.

    Args:
        follows_path: the parameters and the task's gradient are kept, in the state's scratch.
    """

    def __init__(self, follows_path: bool) -> None:
        self.follows_path = follows_path
        self.kept_by: Literal["pull", "penalty"] | None = None
        self._pulled: _Mark | None = None  # of gradients that hold the pull

    def end(self) -> None:
        """The step is over."""
        self.kept_by = self._pulled = None

    @torch.no_grad()
    def pull(self, state: ParameterState, strength: float, scale: float) -> Tensor:
        """Add the pull to gradients that are scaled by `scale`; returns the penalty.

        In the same pass the task's gradient and the parameters are kept. But a closure that is
        evaluated again, where the parameters have moved (LBFGS), belongs to the step that its first
        evaluation began; a step that was dropped has moved nothing.

        Raises:
            RuntimeError: see `check_unpulled`.
            ValueError: everything is frozen, so that nothing is pulled.
        """
        self.check_unpulled(
            state,
            "call add_penalty_grad_() once in a step, after the last backward pass, with penalty() "
            "not in the loss",
        )
        if self.follows_path and not state.scratch:
            state.keep_steps()
        first = None
        if self.follows_path and self.kept_by == "pull" and state.has_moved():
            first = {key: [entry.clone() for entry in kept] for key, kept in state.scratch.items()}
        value = state.add_penalty_grad_(strength * scale)
        if first is not None:
            for key, entries in first.items():
                torch._foreach_copy_(state.scratch[key], entries)
        elif self.follows_path and scale != 1:
            torch._foreach_div_(state.scratch["task_gradient"], scale)
        self._pulled = _mark(state)
        if self._pulled is None:
            raise ValueError(ALL_FROZEN)
        self.kept_by = "pull"
        return value / scale

    def check_unpulled(self, state: ParameterState, remedy: str) -> None:
        """RuntimeError if the gradients are those of the last pull, at most added to since."""
        if self._pulled is None:
            return
        now = state.params[self._pulled.place].grad
        if state.is_sharded and now is not None:
            now = local(now)
        # To clear and fill it again takes two writes, one more backward pass of this step one.
        if (
            now is None
            or now is not self._pulled.gradient()
            or now._version > self._pulled.writes + 1
        ):
            return
        raise RuntimeError(
            f"the pull is in these gradients already and would count twice; {remedy}"
        )

    def follow_backward(self, state: ParameterState) -> None:
        """The penalty is being differentiated: gradients that this pass leaves hold the pull."""
        before = _mark(state)

        def end() -> None:
            after = _mark(state)
            if after is not None and not after.is_same(before):
                self._pulled = after

        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(end)

    def begin_by_penalty(self, state: ParameterState) -> None:
        """The penalty is in the loss: keep the parameters as they are at its last evaluation."""
        if self.kept_by != "pull":
            if not state.scratch:
                state.keep_steps()
            state.restart("step_start")
            self.kept_by = "penalty"

    @torch.no_grad()
    def take_out_pull(self, state: ParameterState, strength: float) -> None:
        """task_gradient = .grad - 2 * strength * importance * (step_start - anchor).

        For a step whose pull came by way of the loss; RuntimeError if its gradients are gone.
        """
        if all(entry.grad is None for entry in state.params):
            raise RuntimeError(
                "update() found no gradients to take the penalty out of; with penalty() in the "
                "loss call update() before zero_grad()"
            )
        gradients, starts = (state.scratch[key] for key in ("task_gradient", "step_start"))
        began = [entry.clone() for entry in starts]
        state.plan.add_quadratic_penalty_grad_(0.0)  # keeps the gradients
        torch._foreach_copy_(starts, began)
        anchors, importances = state.lists["anchor"], state.lists["importance"]
        torch._foreach_neg_(gradients)  # the op adds
        ops.add_quadratic_penalty_grad_(gradients, starts, anchors, importances, strength)
        torch._foreach_neg_(gradients)
