"""What the optimizers share: torch's habits around a fused step, and a method's part in it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from clext.core.checks import flag
from clext.methods import watch
from clext.methods.base import Method
from clext.optim.plans import Plans, identical
from clext.optim.state import allocate_states, check_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from clext.ops.plan import ReferencePlan

Group = dict[str, Any]


class FusedOptimizer(Optimizer):
    """Base of the optimizers of `clext.optim`.

    They differ from torch.optim's in this: the averages of parameters in half precision are kept
    in float32, and an optimizer with a method cannot be pickled or deep-copied (save the state
    dicts of both). A parameter without gradient is left out of everything, as ever, and so of the
    pull to the anchor. `method.clip_grad_norm_` before the step clips the task's gradient; clipped
    by a function of torch, the clipped gradient is the task's to the path integral.

    Args:
        params: as for any optimizer of torch.
        defaults: options of the param groups.
        method: protects what it knows of the parameters, in the same pass; its own
            `add_penalty_grad_` and `update` are then not to be called. A method whose work the pass
            cannot do (a subclass with an `update` of its own) has them called by `step`.
        proximal: pull to the anchor after the step, parameter <- (parameter + p * anchor) / (1 + p)
            with p = 2 * lr * strength * importance, rather than through the gradient: stable at
            any strength. Adam's averages do not scale it, so it needs a far larger strength there.
        clear_grad: set the gradients to zero in the same pass.

    Raises:
        ValueError: an option is out of range, or the method knows none of the parameters.
    """

    # Options that a param group of this class has, and of its namesake, but none of other classes.
    own_options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        params: Iterable[Any],
        defaults: Group,
        *,
        method: Method | None,
        proximal: bool,
        clear_grad: bool,
    ) -> None:
        owner = type(self).__name__
        if method is not None and not isinstance(method, Method):
            raise TypeError(
                f"{owner}: method must be a method of clext or None, got {type(method).__name__}"
            )
        self._method = method
        self.proximal = flag(owner, "proximal", proximal)
        self.clear_grad = flag(owner, "clear_grad", clear_grad)
        if proximal and (method is None or method.fused_state is None):
            given = "None" if method is None else f"{method.name!r}, which has a step of its own"
            raise ValueError(f"{owner}: proximal=True needs a method that pulls, got {given}")
        self._restart()
        super().__init__(params, defaults)
        if method is not None:
            self._attach(method)

    def _restart(self) -> None:
        self._plans = Plans()
        self._penalty: Tensor | None = None
        self._offset = 0.0
        self._checked: list[object] = []  # options as they were last checked

    def _attach(self, method: Method) -> None:
        known = {id(entry) for entry in method.model.parameters()}
        if not any(id(entry) in known for group in self.param_groups for entry in group["params"]):
            raise ValueError(
                f"{type(self).__name__}: {method.name} was made for a model that has none of these "
                "parameters"
            )
        if method.fused_state is not None:
            method._attach()

    # ------------------------------------------------------------------ for subclasses

    def _check_group(self, group: Group) -> None:
        """Raise ValueError for an option out of range; numbers become floats."""
        raise NotImplementedError

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        """Names of the state of this group's parameters, "step" among them if steps are counted."""
        raise NotImplementedError

    def _run(self, plan: ReferencePlan, group: Group, **shared: Any) -> Tensor | None:  # noqa: ANN401
        """One step of `plan` with the options of `group`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the step

    @property
    def method(self) -> Method | None:
        """The method that was given; for another one, make another optimizer."""
        return self._method

    @property
    def penalty(self) -> Tensor:
        """The method's penalty before the last step: 0-dim; zero where there was none.

        Of several optimizers with one method each has the part of its own parameters; the constant
        of `EWC(anchors="all")` is in each.
        """
        value = self._penalty
        if value is None:
            params = (entry for group in self.param_groups for entry in group["params"])
            value = torch.zeros((), device=next((entry.device for entry in params), None))
        return value + self._offset if self._offset else value

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to `step` to scale gradients back and to skip."""
        return self.method is None or self.method.fused_state is not None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step all parameters that have a gradient, and do what the method does at a step.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: in the capture of a CUDA graph, for a method that counts its steps:
                capture `launch` then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        method = self.method
        if method is None:
            self.launch()
        elif method.fused_state is None:
            self._step_apart(method)
        else:
            if any(type(part).after_step is not Method.after_step for part in method.parts):
                self._refuse_capture(
                    f"step() of {method.name} counts on the host, which a graph does not repeat; "
                    "capture optimizer.launch() and call method.after_step() after each replay"
                )
            self.launch()
            for part in method.parts:
                part.after_step()
        return loss

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def launch(self) -> None:
        """The pass alone, without the method's `after_step`: what a CUDA graph can capture.

        Take a step before, so that there is state. All numbers that are not tensors, the method's
        strength among them, are in a graph what they were at the capture; capture again after
        `method.consolidate`.

        Raises:
            RuntimeError: the method has an `update` of its own, or state is missing in a capture.
        """
        method = self.method
        if method is not None and method.fused_state is None:
            raise RuntimeError(
                f"{type(self).__name__}.launch: the step of {method.name} is more than one pass "
                "(it has an update of its own); call step()"
            )
        try:
            self._launch(method, self.clear_grad)
        except (TypeError, ValueError) as error:
            raise (error if method is None else method._explained(error)) from None

    def _launch(self, method: Method | None, clear_grad: bool) -> None:
        self._check_options()
        proximal = flag(type(self).__name__, "proximal", self.proximal)
        clear_grad = flag(type(self).__name__, "clear_grad", clear_grad)
        numbers = {"strength": 0.0, "decay": 0.0}
        if method is not None:
            method._note_pull()
            numbers |= method.step_options()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        task_scale = None if method is None else method.take_task_scale()
        values = []
        for part in self._plans.current(self):
            lr = part.group["lr"]
            if isinstance(lr, Tensor):
                lr = lr.reshape(()) if lr.device.type == "cpu" else _on(part.device, lr)
            value = self._run(
                part.plan,
                part.group,
                lr=lr,
                **numbers,
                proximal=proximal,
                clear_grad=clear_grad,
                grad_scale=_on(part.device, scale),
                found_inf=_on(part.device, found_inf),
                task_scale=_on(part.device, task_scale),
            )
            if value is not None:
                values.append(value)
        if clear_grad and found_inf is not None:
            self._clear_grads()  # a step that is skipped leaves them, and they would stay infinite
        self._penalty = _total(values)
        self._offset = method.penalty_offset() if method is not None and values else 0.0

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _step_apart(self, method: Method) -> None:
        """A step for a method whose own functions are called around it."""
        owner = type(self).__name__
        self._refuse_capture(f"{method.name} has an update of its own, which may need the host")
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError(
                f"{owner}: {method.name} adds to the gradients by itself, so they have to be "
                "unscaled before; grad_scale is not expected"
            )
        self._check_options()
        method._note_pull()
        value = method.add_penalty_grad_()
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{owner}: add_penalty_grad_() of {method.name} must return the penalty, a 0-dim "
                f"tensor, got {type(value).__name__}"
            )
        self._launch(None, clear_grad=False)
        self._penalty = value.detach()
        watch.note_step(method)  # to torch it is not over yet
        method.update()
        if self.clear_grad:
            self._clear_grads()

    def _check_options(self) -> None:
        """Check the options of all groups, before any moves, if a hand or a scheduler set one."""
        options = [value for group in self.param_groups for value in group.values()]
        if not identical(options, self._checked):
            for group in self.param_groups:
                self._check_group(group)
            self._checked = [value for group in self.param_groups for value in group.values()]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero; what the method clipped with is forgotten."""
        super().zero_grad(set_to_none)
        if self.method is not None:
            self.method._forget_scales_of(
                entry for group in self.param_groups for entry in group["params"]
            )

    @torch.no_grad()
    def _clear_grads(self) -> None:
        params = [entry for group in self.param_groups for entry in group["params"]]
        grads = [entry.grad for entry in params if entry.grad is not None]
        if grads:
            torch._foreach_zero_(grads)

    def _refuse_capture(self, why: str) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"{type(self).__name__} in the capture of a CUDA graph: {why}")

    # ------------------------------------------------------------------ torch's habits

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with options of their own.

        ValueError if an option is out of range, or a parameter is there twice.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if len(set(group["params"])) < len(group["params"]):
                raise ValueError(
                    f"{type(self).__name__}: a parameter is in group {len(self.param_groups) - 1} "
                    "twice (tied weights, say); name it once"
                )
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a copy of a state of this class, or of its namesake in torch.optim.

        Raises:
            ValueError: it is of another class, does not fit the param groups, or has an option out
                of range; nothing is changed.
        """
        self._check_form(state_dict)
        given: dict[Tensor, dict[str, Any]] = {}

        def check(_optimizer: Optimizer, loaded: dict[str, Any]) -> None:
            self._check_form(loaded)
            for group in loaded["param_groups"]:
                self._check_group({**self.defaults, **group})
            saved = (entry for group in loaded["param_groups"] for entry in group["params"])
            own = (entry for group in self.param_groups for entry in group["params"])
            # Other lengths are torch's to refuse.
            for number, entry in zip(saved, own, strict=False):
                if number in loaded["state"]:
                    check_state(entry, loaded["state"][number])
                    given[entry] = dict(loaded["state"][number])

        def take(_optimizer: Optimizer) -> None:
            self.state.update(given)  # torch has cast it to the parameters' dtypes
            for group in self.param_groups:
                self._check_group(group)
                by_device: dict[torch.device, list[Tensor]] = {}
                for entry in group["params"]:
                    if self.state.get(entry):
                        by_device.setdefault(entry.device, []).append(entry)
                for loaded in by_device.values():
                    allocate_states(self.state, loaded, self._state_keys(group))

        handles = (
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(take, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _check_form(self, state_dict: object) -> None:
        """Raise ValueError for what cannot be a state dict of this class or its namesake."""
        owner = type(self).__name__
        parts = state_dict if isinstance(state_dict, dict) else {}
        states, groups = parts.get("state"), parts.get("param_groups")
        if not (
            isinstance(states, dict)
            and isinstance(groups, list | tuple)
            and all(isinstance(state, dict) for state in states.values())
            and all(isinstance(group, dict) and "params" in group for group in groups)
        ):
            raise ValueError(
                f"{owner}: load_state_dict expects what state_dict() returns, a dict of 'state' "
                f"and 'param_groups', got {type(state_dict).__name__}"
                + (f" of {', '.join(map(repr, parts)) or 'nothing'}" if parts is state_dict else "")
            )
        for group in groups[:1]:
            missing = [option for option in self.own_options if option not in group]
            if missing:
                raise ValueError(
                    f"{owner}: the state dict has no option {missing[0]!r}, so it is of another "
                    f"optimizer; expected one of {owner} here or in torch.optim"
                )

    def __getstate__(self) -> dict[str, Any]:
        if self.method is not None:
            raise TypeError(
                f"{type(self).__name__}: an optimizer with a method cannot be pickled or copied; "
                "save its state_dict() and the method's"
            )
        own = {"_method": None, "proximal": self.proximal, "clear_grad": self.clear_grad}
        # Tensors of their own: pickle would write all of their common memory for each.
        state = {
            parameter: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entries.items()}
            for parameter, entries in self.state.items()
        }
        return {**super().__getstate__(), "state": defaultdict(dict, state), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._restart()
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    # The CPU reads it at once.
    return value.reshape(()).to(device, non_blocking=device.type != "cpu")


def _total(values: Sequence[Tensor]) -> Tensor | None:
    """Their sum, on the device of the first."""
    if len(values) < 2:
        return values[0] if values else None
    return torch.stack([value.to(values[0].device) for value in values]).sum()
