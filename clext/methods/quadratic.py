"""The quadratic penalty: strength * sum of importance * (parameter - anchor)^2."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from clext.core.parameters import (
    adapted_parameters,
    canonical_names,
    check_parameters,
    check_wrappers,
)
from clext.core.processes import sharded_modules
from clext.core.sharding import plus
from clext.methods.base import Method
from clext.methods.parts.options import checked_state_dtype, scale_of
from clext.methods.parts.state import ParameterState, StateView
from clext.methods.parts.step import Step

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.supervision import SupervisionOptions

T = TypeVar("T")


class QuadraticPenalty(Method):
    """Pulls each parameter to its anchor, by its importance; subclasses say what is important.

    The penalty is strength * (sum of importance * (parameter - anchor)^2 + constant), zero until
    the first task has ended; frozen parameters without a gradient have no part in it.

    A method with a path integral ("path" in `state_names`: SI, RWalk) keeps the task's gradient and
    the parameters when the pull is added, and `update` uses these: what happens to `.grad` in
    between, or to parameters between steps, does not count. With `penalty()` in the loss it takes
    the pull out of `.grad` again, inexactly if that was clipped: to clip, use `add_penalty_grad_`.

    A subclass names its state in `state_names`: for each parameter one tensor per name.

    Args:
        model: see `Method`.
        strength: weight of the penalty, >= 0.
        state_dtype: torch.bfloat16 (or "bfloat16") keeps anchor and importance in half the memory,
            with 8 significant bits: a parameter that is not bfloat16 is pulled to its value rounded
            to these, and what a task adds is lost where it is less than 1/512 of what is there.
            Sums, paths and averages stay float32. None: float32 (float64 for float64 parameters,
            for which it must be None).
    """

    default_strength: ClassVar[float] = 1.0
    has_strength: ClassVar[bool] = True
    has_penalty: ClassVar[bool] = True
    state_names: tuple[str, ...] = ("anchor", "importance")
    state_kind: ClassVar[type[ParameterState]] = ParameterState
    fused: tuple[str, ...] | None = ("anchor", "importance")

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        state_dtype: torch.dtype | str | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        self.state_dtype = checked_state_dtype(self.name, state_dtype)
        self._state = self.state_kind(self._parameters_now(), self.state_names, self.state_dtype)
        self._step = Step("path" in self.state_names)

    @property
    def importance(self) -> StateView:
        """Importance of each parameter by name: the state itself, which may be written."""
        return self._state.view("importance")

    @importance.setter
    def importance(self, values: Mapping[str, Tensor]) -> None:
        self.importance.assign(values)

    @property
    def anchor(self) -> StateView:
        """What the parameters are pulled to, by name: the state itself, which may be written."""
        return self._state.view("anchor")

    @anchor.setter
    def anchor(self, values: Mapping[str, Tensor]) -> None:
        self.anchor.assign(values)

    def penalty(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """The penalty: 0-dim, differentiable, to be added to the loss.

        `params`: values by parameter name that are meant in place of the model's, as
        `torch.func.functional_call` takes them; works under the transforms of torch.func, and is
        not taken for a step. ValueError: a name or a shape that is no parameter's.
        """
        given = None if params is None else self._given(params)
        value = self._on_state(lambda state: state.penalty(given))
        penalty = self.strength * (value + self.constant)
        if given is None and penalty.requires_grad:
            if not torch.compiler.is_compiling():
                penalty.register_hook(lambda _: self._step.follow_backward(self._state))
            if self._step.follows_path:
                self._step.begin_by_penalty(self._state)
            else:  # a count that a compiled loss advanced would compile it anew in each step
                self.steps = 1 if torch.compiler.is_compiling() else self.steps + 1
        return penalty

    def add_penalty_grad_(self, scaler: object = None) -> Tensor:
        """Add the penalty's gradient to `.grad` in one pass; returns the penalty (0-dim).

        Call it once in a step, on complete gradients; after it they may be clipped or dropped.
        `scaler`: the GradScaler (or factor) by which they are scaled still; none after `unscale_`.
        Of sharded parameters it returns a DTensor, which `full_tensor()` sums over the processes.
        RuntimeError: these gradients hold the pull already, by this or by `penalty` in the loss.
        """
        scale = 1.0 if scaler is None else scale_of(scaler)
        value = self._on_state(partial(self._step.pull, strength=self.strength, scale=scale))
        self.steps += not self._step.follows_path
        return plus(value, self.strength * self.constant) if self.constant else value

    def update(self) -> None:
        """Look at a step, after it; RuntimeError if a path integral needs it and none was kept."""
        if self._step.follows_path:
            if self._step.kept_by is None:
                raise RuntimeError(
                    f"{self.name}: update() saw no step; call add_penalty_grad_() before "
                    "optimizer.step() (or add penalty() to the loss), from the first task on"
                )
            if self._step.kept_by == "penalty":
                self._step.take_out_pull(self._state, self.strength)
            self._follow_step()
            self.steps += 1
        self._step.end()
        self._after_step()

    def _follow_step(self) -> None:
        """What the step that was kept adds to the path integral."""

    def _check_unpulled(self, remedy: str) -> None:
        self._step.check_unpulled(self._state, remedy)

    def refresh_parameters(self) -> None:
        """Follow a change of the model: parameters added, grown, replaced, unfrozen or moved.

        `begin_task` and `consolidate` do so, but a loop without `begin_task` has to call this
        before its first step with other parameters. Of one that has grown the leading part keeps
        its state; new parameters and rows start without importance, anchored where they are. What
        is no longer in the model is forgotten, with a warning where a task has ended. ValueError:
        a parameter has shrunk or has another number of dimensions; nothing is changed.
        """
        named = self._parameters_now(self._state)
        if self._state.fits(named):
            return
        check_wrappers(self.model)
        check_parameters(named, type(self.model).__name__)
        state = self.state_kind(named, self.state_names, self.state_dtype)
        lost = state.adopt(self._state, self.name)
        self._state = state
        self._step.end()
        if lost and self.tasks > 0:
            more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
            warnings.warn(
                f"clext: parameter '{lost[0]}'{more} is not in the model any more, so what this "
                f"{self.name} knew of it is forgotten",
                stacklevel=3,
            )

    def _follow_model(self) -> None:
        for name, parameter in adapted_parameters(self.model).items():
            if self._state.protects(parameter):
                raise ValueError(
                    f"{self.name} protects '{name}', which is frozen now while an adapter changes "
                    "what it does, so the penalty would be 0; use "
                    f"clext.integrations.peft.MergedPenalty({self.name}) in its place"
                )
        self.refresh_parameters()

    def _parameters_now(self, known: ParameterState | None = None) -> dict[str, nn.Parameter]:
        """The trainable parameters, and those known that were frozen since, by canonical name."""
        for module in sharded_modules(self.model):
            module.reshard()  # after a pass without gradients some may hold whole parameters
        named = canonical_names(dict(self.model.named_parameters()))
        names, ids = (known.names, set(map(id, known.params))) if known else ((), set())
        return {n: p for n, p in named.items() if p.requires_grad or n in names or id(p) in ids}

    def _given(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values by canonical name; ValueError if one is of no parameter of the model."""
        given = canonical_names(params)
        known = canonical_names(dict(self.model.named_parameters()))
        for name, value in given.items():
            wanted = list(known[name].shape) if name in known else "a parameter of the model"
            if list(value.shape) != wanted:
                got = f"{name!r} of shape {list(value.shape)}"
                raise ValueError(f"{self.name}: penalty was given {got}, expected {wanted}")
        return given

    def _on_state(self, call: Callable[[ParameterState], T]) -> T:
        """`call(state)`; once more if it failed because parameters were moved, or all replaced."""
        try:
            return call(self._state)
        except (TypeError, ValueError):
            if self._state.fits(self._parameters_now(self._state)):
                raise
        self._follow_model()
        return call(self._state)

    def _copies(self) -> dict[str, Tensor]:
        views = {key: self._state.view(key) for key in self._state.lists}
        lists = {f"{key} of '{n}'": e for key, view in views.items() for n, e in view.items()}
        return {**super()._copies(), **lists}

    def _save(self) -> dict[str, Any]:
        return {"state": self._state.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self._state.load_state_dict(state["state"])
        self._step.end()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": Step(self._step.follows_path)}
