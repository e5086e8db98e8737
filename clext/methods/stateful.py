"""What a method keeps of its model, by name: through a change of the model and through a resume."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from clext.core.checks import choice, integer, number
from clext.core.parameters import check_parameters, trainable_parameters
from clext.methods.parts.state import ParameterState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    # What is left to do once nothing can fail any more.
    Commit = Callable[[], None]

# Sums of squares and of max(0, .): below zero they would push parameters away from the anchor.
_NEVER_NEGATIVE = frozenset({"importance", "fisher", "running_fisher", "score", "task_score"})
_LARGEST_COUNT = 2**63 - 1  # seeds are made of counts


class Stateful:
    """What a method keeps: for each parameter a tensor per name in `state_names`, and counters.

    `Learning` (learning.py) adds a task's beginning, loss and prediction, and the outputs and what
    else these keep to the state; `Method` (base.py), on top of both, a step and a task's end.
    """

    name: ClassVar[str]
    default_strength: ClassVar[float] = 1.0
    # Whether there is anything to weigh: a penalty, or a loss on what was learned before.
    has_strength: ClassVar[bool] = True
    state_names: tuple[str, ...] = ("anchor", "importance")
    counter_names: tuple[str, ...] = ("tasks",)
    separate_state: ClassVar[tuple[str, ...]] = ()
    # What is kept beside `state_names` -> bytes, in the letters of `clext.training.describe`.
    memory: ClassVar[dict[str, str]] = {}
    # The values that an option in words may have, the default first.
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(self, model: nn.Module, *, strength: float | None = None) -> None:
        self.model = model
        self.strength = self.default_strength if strength is None else strength
        self.tasks = 0  # ended so far
        self._attached = False  # to an optimizer, whose steps do the work
        # By the replays of a CUDA graph, or a penalty of the user's own of these views, for all
        # that is known.
        self._is_held_unseen = False
        # By a hand or a state that was loaded, for all that is known: before a task has ended.
        self._has_been_given_importance = False
        self._state = ParameterState(trainable_parameters(model), self.state_names)

    def _choice(self, option: str, value: object) -> str:
        return choice(self.name, option, value, self.choices[option])

    @property
    def strength(self) -> float:
        """Weight of the penalty."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = self._checked_strength(value)

    def _checked_strength(self, value: object) -> float:
        checked = number(self.name, "strength", value, minimum=0.0)
        if checked != 0 and not self.has_strength:
            raise ValueError(f"{self.name} has no penalty, so no strength; leave it out")
        return checked

    @property
    def importance(self) -> dict[str, Tensor]:
        """Importance of each parameter by name: views of the method's own state."""
        self._is_held_unseen = self._has_been_given_importance = True
        return self._state.view("importance")

    @property
    def anchor(self) -> dict[str, Tensor]:
        """What the parameters are pulled to, by name: views of the method's own state."""
        self._is_held_unseen = True
        return self._state.view("anchor")

    def refresh_parameters(self) -> None:
        """Follow a change of the model: parameters added, grown, replaced, unfrozen or moved.

        `begin_task` and `consolidate` do so by themselves, but a loop without `begin_task` has to
        call this before its first step on a changed model. A parameter keeps importance and anchor
        under another name too; one in the place of another (of its name) takes over those of the
        other, one that has grown for its leading part (the old rows of a head). New parameters and
        rows start without importance, anchored where they are. What is no longer in the model is
        forgotten, with a warning where a task has ended.

        Raises:
            ValueError: a parameter has shrunk or has another number of dimensions, or no state can
                be kept for it; nothing is changed.
        """
        named = self._parameters_now()
        if not self._state.fits(named):
            check_parameters(named, type(self.model).__name__)
            state = ParameterState(named, self._kept_names())
            try:
                state.adopt(self._state)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from None
            lost = state.lost(self._state) if self.tasks > 0 else []
            self._state = state
            if lost and self.state_names:
                more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
                warnings.warn(
                    f"clext: parameter '{lost[0]}'{more} is not in the model any more, so what "
                    f"this {self.name} knew of it is forgotten",
                    stacklevel=3,
                )

    def _parameters_now(self) -> dict[str, nn.Parameter]:
        """The trainable parameters, and those known that were frozen since."""
        known, ids = set(self._state.names), self._state.ids
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or name in known or id(parameter) in ids
        }

    def to(self, device: str | torch.device) -> Self:
        """Move the state to `device`, where the model has to be already; returns the method."""
        target = torch.empty(0, device=device).device
        for name, parameter in self.model.named_parameters():
            if parameter.device != target:
                raise ValueError(
                    f"{self.name}: parameter '{name}' is on {parameter.device}, expected {target}: "
                    "move the model first (model.to)"
                )
        self.refresh_parameters()
        return self

    def state_dict(self) -> dict[str, Any]:
        """Everything that training needs to go on as if it had not stopped, as copies.

        Plain dicts of tensors, numbers and strings; the options are not among them.
        """
        return {
            "method": self.name,
            "strength": self.strength,
            "counters": {name: getattr(self, name) for name in self.counter_names},
            "state": {
                key: {name: entry.clone() for name, entry in self._state.view(key).items()}
                for key in self._kept_names()
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state made by `state_dict`, strength included; load the model's before it.

        It may come from a method that an optimizer had, or had not.

        Raises:
            ValueError: it is of another method, or of a model with other parameters, or holds what
                no training leaves; nothing is changed.
        """
        self._prepare_load(state_dict)()

    def _prepare_load(self, state_dict: Mapping[str, Any]) -> Commit:
        """Check a state, as `load_state_dict`; returns what takes it over."""
        self.refresh_parameters()
        loaded = _checked_state(self, state_dict)
        counters = self._checked_counters(state_dict["counters"])

        def commit() -> None:
            self.strength = state_dict["strength"]
            for name, value in counters.items():
                setattr(self, name, value)
            for own, other in loaded:
                own.copy_(other)
            for key in set(self.separate_state) - state_dict["state"].keys():
                self._state.restart(key)
            if self.tasks == 0 and "importance" in self.state_names:  # a hand may have given some
                given = any(bool(entry.any()) for entry in self._state.lists["importance"])
                self._has_been_given_importance |= given

        return commit

    def _checked_counters(self, given: Mapping[str, Any]) -> dict[str, int | float]:
        """The counters of a state, each of the type that it has here; ValueError for others."""
        owner = f"{self.name}: state_dict['counters']"
        counters: dict[str, int | float] = {}
        for name in self.counter_names:
            label = f"{name!r}"
            if isinstance(getattr(self, name), float):
                counters[name] = number(owner, label, given[name], minimum=0.0)
            else:
                counters[name] = integer(owner, label, given[name], minimum=0)
                if counters[name] > _LARGEST_COUNT:
                    raise ValueError(
                        f"{owner}: {label} must be an integer < 2**63, got {given[name]!r}"
                    )
        return counters

    def _state_dict_keys(self) -> list[str]:
        """The entries that a state dict has to have."""
        return ["method", "strength", "counters", "state"]

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in option_names(type(self))}
        options = [
            f"{name}={type(value).__name__ if isinstance(value, nn.Module) else repr(value)}"
            for name, value in values.items()
        ]
        size = sum(parameter.numel() for parameter in self._state.params)
        described = ", ".join([*options, f"tasks={self.tasks}"])
        return f"{type(self).__name__}({described}; {size:,} parameters)"

    def _explained(self, error: Exception) -> Exception:
        """`error`, with the remedy if its cause is that the model was changed or moved."""
        if self._state.fits(self._parameters_now()):
            return error
        return type(error)(
            f"{self.name}: the parameters are not what they were when this method last looked "
            f"(moved, converted, grown or replaced); call refresh_parameters() ({error})"
        )

    def _kept_names(self) -> list[str]:
        dropped = self.separate_state if self._attached else ()
        return [key for key in self.state_names if key not in dropped]


def option_names(method: type[Stateful]) -> list[str]:
    """The keyword options of a method, strength included where it has one."""
    parameters = inspect.signature(method).parameters.values()
    names = [entry.name for entry in parameters if entry.kind is entry.KEYWORD_ONLY]
    return [name for name in names if name != "strength" or method.has_strength]


def _checked_state(method: Stateful, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of an own tensor of `method` and the loaded one for it."""
    owner = f"{method.name}: state_dict"
    _check_keys(owner, state_dict, method._state_dict_keys())
    if state_dict["method"] != method.name:
        raise ValueError(f"{owner} is of method {state_dict['method']!r}, not {method.name!r}")
    method._checked_strength(state_dict["strength"])
    _check_keys(f"{owner}['counters']", state_dict["counters"], method.counter_names)
    given = state_dict["state"]
    optional = [key for key in method.separate_state if isinstance(given, dict) and key in given]
    required = [key for key in method.state_names if key not in method.separate_state]
    _check_keys(f"{owner}['state']", given, [*required, *optional])
    pairs = []
    for key in (key for key in method._kept_names() if key in given):
        label = f"{owner}['state'][{key!r}]"
        _check_keys(label, given[key], method._state.names)
        for name, own in method._state.view(key).items():
            other = given[key][name]
            if not isinstance(other, Tensor) or other.shape != own.shape:
                got = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
                raise ValueError(f"{label}[{name!r}] is {got}, expected {list(own.shape)}")
            if not other.is_floating_point() or other.layout != torch.strided or other.is_meta:
                raise ValueError(
                    f"{label}[{name!r}] is {other.dtype}, {other.layout} on {other.device}, "
                    "expected a dense tensor of real floating-point values"
                )
            if not bool(other.isfinite().all()):
                raise ValueError(f"{label}[{name!r}] holds NaN or infinity")
            if key in _NEVER_NEGATIVE and bool(other.lt(0).any()):
                raise ValueError(f"{label}[{name!r}] holds values below 0, expected none")
            pairs.append((own, other))
    return pairs


def _check_keys(label: str, given: object, expected: tuple[str, ...] | list[str]) -> None:
    if not isinstance(given, dict):
        raise ValueError(
            f"{label} is {type(given).__name__}, expected a dict as state_dict() makes it"
        )
    got = set(given)
    missing, unexpected = sorted(set(expected) - got), sorted(got - set(expected), key=str)
    if missing or unexpected:
        raise ValueError(
            f"{label} does not fit: missing {', '.join(missing) or 'nothing'}, "
            f"unexpected {', '.join(map(str, unexpected)) or 'nothing'}"
        )
