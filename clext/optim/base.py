"""What the optimizers share: torch's habits around a fused step, and a method's part in it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch's optimizers: lazily, unlike torch.compiler's
from torch.optim import Optimizer

from clext.core.checks import flag, learning_rate, number, refuse, scalar
from clext.core.sharding import plus
from clext.optim.clip import clip_factor
from clext.optim.plans import Group, Keys, Part, Plans, fitted, refuse_capture
from clext.optim.protector import Attached, Protector, check_whole, fingerprint, warn_if_other

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from clext.ops.plan import ReferencePlan


class Shared(TypedDict, total=False):
    """Options of all optimizers, see `FusedOptimizer`."""

    method: Protector | None
    proximal: bool
    clear_grad: bool
    max_grad_norm: float | None


class FusedOptimizer(Optimizer):
    """Base of the optimizers of `clext.optim`.

    They differ from torch.optim's in this: the averages of parameters in half precision are kept
    in float32. A parameter without gradient is left out of everything, as ever, and so of the pull
    to the anchor. Tensors put into `state` by hand do not count; `load_state_dict` takes them over.

    Args:
        params: as for any optimizer of torch.
        defaults: options of the param groups.
        method: protects what it knows of the parameters, in the same pass; its own
            `add_penalty_grad_` and `update` are then not to be called, nor its `penalty` be in the
            loss: a step refuses gradients that hold the pull already (RuntimeError). A method
            whose work the pass cannot do (`fused` is None: KFAC, GEM, A-GEM, an own one) is
            attached: called around the step.
        proximal: pull to the anchor after the step, parameter <- (parameter + p * anchor) / (1 + p)
            with p = 2 * lr * strength * importance, rather than through the gradient: stable at
            any strength. Adam's averages do not scale it, so it needs a far larger strength there.
        clear_grad: set the gradients to zero in the same pass.
        max_grad_norm: > 0; the gradient that moves the parameters is scaled to at most this norm,
            taken over all parameters of the optimizer. The path integral sees it unclipped, and the
            pull is added after it (but that of an attached method is in the gradient already). A
            gradient that was clipped by other means before the step is the task's to the method.

    Raises:
        ValueError: an option is out of range, or the method knows none of the parameters.
    """

    state_keys: ClassVar[Keys] = ()  # names of the state that a parameter may have
    # Options that a param group of this class has, and of its namesake, but none of other classes.
    own_options: ClassVar[Keys] = ()
    takes_sparse: ClassVar[bool] = False  # gradients, as its namesake

    def __init__(
        self,
        params: Iterable[Any],
        defaults: Group,
        *,
        method: Protector | None = None,
        proximal: bool = False,
        clear_grad: bool = False,
        max_grad_norm: float | None = None,
    ) -> None:
        owner = type(self).__name__
        if method is not None and not isinstance(method, Protector):
            raise TypeError(
                f"{owner}: method must be a method of clext or None, got {type(method).__name__}"
            )
        if proximal and not (method is not None and method.fused):
            raise ValueError(
                f"{owner}: proximal=True needs a method that pulls in the optimizer's pass, got "
                f"{None if method is None else method.name}"
            )
        if max_grad_norm is not None:
            max_grad_norm = number(
                owner, "max_grad_norm", max_grad_norm, minimum=0.0, open_minimum=True
            )
        self._method, self.max_grad_norm = method, max_grad_norm
        self.proximal = flag(owner, "proximal", proximal)
        self.clear_grad = flag(owner, "clear_grad", clear_grad)
        super().__init__(params, defaults)
        if method is not None:
            known = set(method.model.parameters())
            if all(known.isdisjoint(group["params"]) for group in self.param_groups):
                raise ValueError(
                    f"{owner}: {method.name} was made for a model that has none of these parameters"
                )
            check_whole(owner, method, self.param_groups)
        self._begin()

    def _begin(self) -> None:
        self._penalty: Tensor | None = None  # before the last step
        self._saved_beside: dict[str, Any] | None = None  # what a loaded state says of its method
        self._protector = self._method  # whose work the pass does
        self._attachment: Attached | None = None  # of a method that is called around the step
        if self._method is not None and self._method.fused is None:
            self._attachment, self._protector = self._method.attach(self), None

    # ------------------------------------------------------------------ for subclasses

    def _check_group(self, group: Group) -> None:
        """Raise ValueError for an option out of range; numbers become floats."""
        owner = type(self).__name__
        refuse(owner, group, "differentiable")
        group["lr"] = learning_rate(owner, group["lr"])
        group["weight_decay"] = scalar(owner, "weight_decay", group["weight_decay"], minimum=0.0)
        flag(owner, "maximize", group["maximize"])

    @classmethod
    def _keys_of(cls, group: Group) -> Keys:  # noqa: ARG003
        """Names of the state of this group's parameters, "step" among them if steps are counted."""
        return cls.state_keys

    def _run(self, plan: ReferencePlan, group: Group, **shared: Any) -> Tensor | None:  # noqa: ANN401
        """One step of `plan` with the options of `group`."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the step

    @property
    def method(self) -> Protector | None:
        """The method that was given; for another one, make another optimizer."""
        return self._method

    @property
    def penalty(self) -> Tensor:
        """The method's penalty before the last step: 0-dim; zero where there was none.

        Of sharded parameters a DTensor: `full_tensor()` sums it, called on all processes.
        Of several optimizers with one method each has the part of its own parameters; the constant
        of `EWC(anchors="all")` is in each.
        """
        value = self._penalty if self._attachment is None else self._attachment.penalty
        if value is not None:
            return value
        params = (entry for group in self.param_groups for entry in group["params"])
        return torch.zeros((), device=next((entry.device for entry in params), None))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler leaves it to `step` to scale gradients back and to skip."""
        return self._attachment is None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step all parameters that have a gradient, and do what the method does at a step.

        Returns the loss of the `closure`, which evaluates the model again. RuntimeError in the
        capture of a CUDA graph with a method: capture `launch` then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._take_step()
        return loss

    @_disable_dynamo
    def _take_step(self) -> None:
        if self._method is not None:
            refuse_capture(
                f"step() of {self._method.name} counts on the host, which a graph does not repeat; "
                "capture optimizer.launch() and call optimizer.after_replay() after each replay"
            )
            if self._saved_beside is not None:
                warn_if_other(type(self).__name__, self._method, self._saved_beside)
                self._saved_beside = None
        self._launch()
        self.after_replay()

    @_disable_dynamo
    def launch(self) -> None:
        """The pass alone, what a CUDA graph can capture; `after_replay` is the rest of a step.

        Take a step before, so that there is state. All numbers that are not tensors, the method's
        strength among them, are in a graph what they were at the capture; capture again after
        `method.consolidate`. RuntimeError if the method is called around the step, and in a capture
        if state is missing or a learning rate is a tensor on another device.
        """
        if self._method is not None and self._protector is None:
            raise RuntimeError(
                f"{type(self).__name__}.launch: the step of {self._method.name} is more than one "
                "pass; call step()"
            )
        self._launch()

    def after_replay(self) -> None:
        """What is left to do for the method after each replay of a captured `launch`."""
        if self._protector is not None:
            self._protector.steps += bool(self._protector.fused)  # there is a pull in the pass
            self._protector._after_step()

    def _launch(self) -> None:
        method, numbers = self._protector, {"strength": 0.0, "decay": 0.0}
        if method is not None:
            method._check_unpulled(
                f"{type(self).__name__} adds it in its step: leave add_penalty_grad_() out, and "
                "penalty() out of the loss (optimizer.penalty is its value)"
            )
            numbers = {"strength": method.strength, "decay": method.decay}
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._plans.refresh(method)
        self._plans.fill_sparse_gradients(type(self).__name__, self.takes_sparse)
        clip = None
        if self.max_grad_norm is not None:
            clip = clip_factor(self.param_groups, self.max_grad_norm, scale)

        def run(part: Part) -> Tensor | None:
            lr = part.group["lr"]
            if isinstance(lr, Tensor):
                if lr.device != part.device:
                    refuse_capture(
                        f"lr is a tensor on {lr.device}, whose value would stay what it is now; "
                        f"put it on {part.device}"
                    )
                lr = _on(lr.device if lr.is_cpu else part.device, lr)
            return self._run(
                part.plan,
                part.group,
                lr=lr,
                **numbers,
                proximal=self.proximal,
                clear_grad=self.clear_grad,
                grad_scale=_on(part.device, scale),
                found_inf=_on(part.device, found_inf),
                clip=_on(part.device, clip),
            )

        penalty: Tensor | None = None
        for value in self._plans.each(method, run):
            if value is not None:
                penalty = value if penalty is None else plus(penalty, value)
        if self.clear_grad and found_inf is not None:
            self.zero_grad(set_to_none=False)  # a skipped pass leaves them, infinite as they are
        if method is not None and method.constant and penalty is not None:
            penalty = plus(penalty, method.strength * method.constant)
        self._penalty = penalty

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
        self._plans = Plans(self.param_groups, self.state, self._keys_of)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; a method adds the entry "method": what it has seen when this was saved."""
        state_dict = super().state_dict()
        if self._method is not None:
            state_dict["method"] = fingerprint(self._method)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a copy of a state of this class, or of its namesake in torch.optim.

        ValueError if it does not fit or has something out of range; nothing is changed. Beside a
        method that has not seen what it had when this was saved, the next step warns.
        """
        before = {"state": self.state, "param_groups": self.param_groups}  # torch makes new ones
        given: list[dict[str, Any]] = []
        handles = (
            self.register_load_state_dict_pre_hook(lambda _, loaded: given.append(loaded)),
            self.register_load_state_dict_post_hook(lambda _: self._take(given[0]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        except Exception as error:
            self.__setstate__(before)
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(
                f"{type(self).__name__}: the state dict does not fit: {reason}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def _take(self, given: dict[str, Any]) -> None:
        """Finish loading: torch has cast the state to dtypes of parameters, not of state."""
        for group, saved in zip(self.param_groups, given["param_groups"], strict=True):
            for option in self.own_options:
                if option not in saved:
                    raise ValueError(f"it has no option {option!r}, so it is of another optimizer")
            self._check_group(group)
            for entry, place in zip(group["params"], saved["params"], strict=True):
                state = self.state.get(entry, {})
                if any(state.get(key) is not None for key in self.state_keys):
                    found = {**state, **given["state"][place]}
                    state.update({key: fitted(entry, key, found[key]) for key in self.state_keys})
        saved = given.get("method")
        is_other = self._method is not None and saved not in (None, fingerprint(self._method))
        self._saved_beside = saved if is_other else None

    def __getstate__(self) -> dict[str, Any]:
        # As arrays: pickle would write all of their common memory for each tensor, and what is
        # copied here would be gone before another process had it.
        state = {
            parameter: {
                key: value.numpy(force=True) if isinstance(value, Tensor) else value
                for key, value in entries.items()
            }
            for parameter, entries in self.state.items()
        }
        names = ("_method", "proximal", "clear_grad", "max_grad_norm")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), "state": defaultdict(dict, state), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for parameter, entries in self.state.items():
            for key, value in entries.items():
                if isinstance(value, np.ndarray):  # a copy, not a loaded state dict
                    entries[key] = fitted(parameter, key, torch.as_tensor(value))
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        self._plans = Plans(self.param_groups, self.state, self._keys_of)
        if "_method" in state:  # a copy, not a loaded state dict
            self._begin()


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    # The CPU reads it at once.
    return value.reshape(()).to(device, non_blocking=device.type != "cpu")
