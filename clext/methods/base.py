"""What every method is: a penalty on the loss, a look at each step, and an end of the task."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from clext import ops
from clext.options import number
from clext.parameters import check_parameters, trainable_parameters
from clext.state import ParameterState

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clext.importance.evaluation import Batches

_REPLACED_BY_A_STEP = ("penalty", "add_penalty_grad_", "update")


class Method:
    """A continual-learning method on one model; subclasses are the methods.

    The training loop is the same for all of them::

        loss = cross_entropy(model(x), y)
        loss.backward()
        method.add_penalty_grad_()      # or, before backward: loss = loss + method.penalty()
        optimizer.step()
        method.update()
        optimizer.zero_grad()
        ...
        method.consolidate(dataloader)  # at the end of each task

    or, in the one pass that updates the parameters, with an optimizer of `clext.optim` that has the
    method: `optimizer.step()` then does what `add_penalty_grad_` and `update` do.

    The penalty is strength * sum of importance * (parameter - anchor)^2, and zero until the first
    task has ended. With a gradient scaler, unscale the gradients before `add_penalty_grad_`.

    A subclass names its state in `state_names` (for each parameter one tensor per name) and its
    counters in `counter_names`, keeps each option in an attribute of the same name, and implements
    `_end_task`; `update` and the penalty may be overridden. `fused_state` names the state that an
    optimizer's pass works on: nothing, anchor and importance (the pull), path too (the path
    integral), or fisher too (its moving average); None means that the pass cannot do what the
    method does, and is what a subclass gets that overrides `penalty`, `add_penalty_grad_` or
    `update` without saying otherwise: optimizers then call these. `separate_state` names what is
    not needed where an optimizer does the work.

    Args:
        model: the trainable parameters of this model are protected; frozen ones are not touched.
        strength: weight of the penalty, >= 0; may be changed at any time.

    Raises:
        ValueError: strength or another option is out of range, the model has no trainable
            parameter, or one that no state can be kept for (see `trainable_parameters`).
    """

    name: ClassVar[str]
    default_strength: ClassVar[float] = 1.0
    state_names: ClassVar[tuple[str, ...]] = ("anchor", "importance")
    counter_names: ClassVar[tuple[str, ...]] = ("tasks",)
    fused_state: ClassVar[tuple[str, ...] | None] = None
    separate_state: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401  (whatever other bases take)
        super().__init_subclass__(**options)
        # Overridden since fused_state was said: then it does not hold for this class.
        owner = next(base for base in cls.__mro__ if "fused_state" in base.__dict__)
        if any(getattr(cls, name) is not getattr(owner, name) for name in _REPLACED_BY_A_STEP):
            cls.fused_state = None
        # A penalty of its own has a gradient of its own, whoever defined the fused one.
        definitions = (
            next(place for place, base in enumerate(cls.__mro__) if name in base.__dict__)
            for name in ("penalty", "add_penalty_grad_")
        )
        if next(definitions) < next(definitions) and cls.fused_state is None:
            cls.add_penalty_grad_ = Method._add_penalty_grad_by_autograd_  # type: ignore[method-assign]

    def __init__(self, model: nn.Module, *, strength: float | None = None) -> None:
        self.model = model
        self.strength = self.default_strength if strength is None else strength
        self.tasks = 0  # ended so far
        self._attached = False  # to an optimizer, whose steps do the work
        self._state = ParameterState(trainable_parameters(model), self.state_names)

    # ------------------------------------------------------------------ in the loop

    @property
    def strength(self) -> float:
        """Weight of the penalty."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = number(self.name, "strength", value, minimum=0.0)

    def penalty(self) -> Tensor:
        """The penalty, strength included: 0-dim, differentiable, to be added to the loss."""
        state = self._state
        anchors, importances = state.lists["anchor"], state.lists["importance"]
        value = self.strength * ops.quadratic_penalty(state.params, anchors, importances)
        if self._attached and value.requires_grad:
            value.register_hook(self._warn_of_a_second_pull)
        return value

    def add_penalty_grad_(self) -> Tensor:
        """Add the penalty's gradient to `.grad` in one pass and return the penalty (0-dim).

        Call it after `loss.backward()`; it replaces `penalty()` in the loss.
        """
        self._refuse_if_attached("add_penalty_grad_")
        return self._state.plan.add_quadratic_penalty_grad_(self._strength)

    def _add_penalty_grad_by_autograd_(self) -> Tensor:
        """What `add_penalty_grad_` is where only `penalty` was overridden."""
        with torch.enable_grad():
            value = self.penalty()
        if value.requires_grad:
            value.backward()
        return value.detach()

    def update(self) -> None:
        """Look at a step: after `optimizer.step()`, before the gradients are cleared."""
        self._refuse_if_attached("update")

    def consolidate(self, dataloader: Batches | None = None) -> None:
        """End a task: importance and anchor for the tasks to come.

        Args:
            dataloader: iterable of (x, y) batches of the task, for methods that measure importance
                on data (EWC, MAS, SCP); others leave it alone.

        Raises:
            ValueError: the data is missing or not as described; nothing is changed.
        """
        self.refresh_parameters()
        self._end_task(dataloader)
        self.tasks += 1

    def _end_task(self, dataloader: Batches | None) -> None:
        raise NotImplementedError

    def _warn_if_zero(self, key: str) -> None:
        """Say so if a task ends without a trace of its steps: nothing would be protected."""
        if not any(bool(entry.any()) for entry in self._state.lists[key]):
            remedy = "call update() after optimizer.step() and before zero_grad()"
            if self._attached:
                remedy = f"take the steps with the optimizer that was given this {self.name}"
            warnings.warn(
                f"clext: {self.name} saw no step of this task that changed a parameter; {remedy}",
                stacklevel=4,
            )

    # ------------------------------------------------------------------ for optimizers

    def after_step(self) -> None:
        """What is left to do after a step that an optimizer of `clext.optim` has taken.

        The optimizer calls it. Where `optimizer.launch()` was captured in a CUDA graph, call it
        after each replay.
        """

    def step_options(self) -> dict[str, float]:
        """Numbers that the optimizer's pass needs: "strength", and "decay" of fisher's average."""
        return {"strength": self._strength, "decay": 0.0}

    def penalty_offset(self) -> float:
        """What the penalty is more than strength * sum of importance * (parameter - anchor)^2."""
        return 0.0

    def _attach(self) -> None:
        """From now on an optimizer's steps do what `add_penalty_grad_` and `update` did."""
        self._attached = True
        self.refresh_parameters()
        self._state.drop(self.separate_state)

    def _refuse_if_attached(self, name: str) -> None:
        if self._attached:
            raise RuntimeError(
                f"{self.name}: {name}() is not to be called: this method was given to an optimizer "
                "of clext.optim, whose step() does it; leave the call out (for an optimizer of "
                f"another kind make a new {self.name} and load this one's state_dict())"
            )

    def _warn_of_a_second_pull(self, _grad: Tensor) -> None:
        warnings.warn(
            f"clext: penalty() of {self.name} is in the loss, and the step() of the optimizer that "
            "was given this method adds its gradient as well: leave it out of the loss",
            stacklevel=2,
        )

    def _kept_names(self) -> list[str]:
        dropped = self.separate_state if self._attached else ()
        return [key for key in self.state_names if key not in dropped]

    # ------------------------------------------------------------------ state

    @property
    def importance(self) -> dict[str, Tensor]:
        """Importance of each parameter by name: views of the method's own state."""
        return self._state.view("importance")

    @property
    def anchor(self) -> dict[str, Tensor]:
        """What the parameters are pulled to, by name: views of the method's own state."""
        return self._state.view("anchor")

    def refresh_parameters(self) -> None:
        """Follow a change of the model: parameters added, grown, replaced, unfrozen or moved.

        `consolidate` does so by itself. Known parameters keep their state (a grown one the state of
        its leading part); new ones start without importance, anchored where they are.
        """
        known = set(self._state.names)
        named = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad or name in known
        }
        if not self._state.fits(named):
            check_parameters(named, type(self.model).__name__)
            state = ParameterState(named, self._kept_names())
            state.adopt(self._state)
            self._state = state

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
            ValueError: it is of another method, or of a model with other parameters; nothing is
                changed.
        """
        self.refresh_parameters()
        loaded = self._checked_state(state_dict)
        self.strength = state_dict["strength"]
        for name in self.counter_names:
            setattr(self, name, type(getattr(self, name))(state_dict["counters"][name]))
        for own, other in loaded:
            own.copy_(other)
        for key in set(self.separate_state) - state_dict["state"].keys():
            self._state.restart(key)

    def _checked_state(self, state_dict: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of an own tensor and the loaded one for it."""
        owner = f"{self.name}: state_dict"
        _check_keys(owner, state_dict, ("method", "strength", "counters", "state"))
        if state_dict["method"] != self.name:
            raise ValueError(f"{owner} is of method {state_dict['method']!r}, not {self.name!r}")
        number(self.name, "strength", state_dict["strength"], minimum=0.0)
        _check_keys(f"{owner}['counters']", state_dict["counters"], self.counter_names)
        given = state_dict["state"]
        optional = [key for key in self.separate_state if isinstance(given, dict) and key in given]
        required = [key for key in self.state_names if key not in self.separate_state]
        _check_keys(f"{owner}['state']", given, [*required, *optional])
        pairs = []
        for key in (key for key in self._kept_names() if key in given):
            label = f"{owner}['state'][{key!r}]"
            _check_keys(label, given[key], self._state.names)
            for name, own in self._state.view(key).items():
                other = given[key][name]
                if not isinstance(other, Tensor) or other.shape != own.shape:
                    got = list(other.shape) if isinstance(other, Tensor) else type(other).__name__
                    raise ValueError(f"{label}[{name!r}] is {got}, expected {list(own.shape)}")
                if not bool(other.isfinite().all()):
                    raise ValueError(f"{label}[{name!r}] holds NaN or infinity")
                pairs.append((own, other))
        return pairs

    def __repr__(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in option_names(type(self))]
        size = sum(parameter.numel() for parameter in self._state.params)
        described = ", ".join([*options, f"tasks={self.tasks}"])
        return f"{type(self).__name__}({described}; {size:,} parameters)"


def option_names(method: type[Method]) -> list[str]:
    """The keyword options of a method, strength included."""
    parameters = inspect.signature(method).parameters.values()
    return [entry.name for entry in parameters if entry.kind is entry.KEYWORD_ONLY]


def _check_keys(label: str, given: object, expected: tuple[str, ...] | list[str]) -> None:
    got = set(given) if isinstance(given, dict) else set()
    missing, unexpected = sorted(set(expected) - got), sorted(got - set(expected), key=str)
    if not isinstance(given, dict) or missing or unexpected:
        raise ValueError(
            f"{label} does not fit: missing {', '.join(missing) or 'nothing'}, "
            f"unexpected {', '.join(map(str, unexpected)) or 'nothing'}"
        )
