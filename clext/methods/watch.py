"""Gradients that somebody changes between a method's pull and the optimizer's step.

A method with a path integral takes the penalty's share out of `.grad` again. If the gradients were
clipped in between, say, what it takes out is not what is in there, and the rest would leak into the
importance. So the method leaves a stamp of the gradients here, and the step of any optimizer of
torch that has its parameters is preceded by a comparison. (It has to be before the step: fused
optimizers of torch write to the gradients while they step.)

What `clip_grad_norm_` multiplied with is of the gradients that it clipped, and of no others: see
`Clipped`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import TensorWeakRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from torch.optim import Optimizer

    from clext.methods.base import Method

_stamps: WeakKeyDictionary[Method, tuple[int, int]] = WeakKeyDictionary()  # and the steps then
_steps: WeakKeyDictionary[Method, int] = WeakKeyDictionary()  # of optimizers, since the first stamp
_updates: WeakKeyDictionary[Method, int] = WeakKeyDictionary()  # steps until the last update
_clipped: WeakKeyDictionary[Method, Clipped] = WeakKeyDictionary()
_is_registered = False


class Clipped:
    """Which gradients were clipped.

    Not by their stamp: a new gradient may have the address, and after an accumulation the version,
    of one that is gone.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._known = {
            id(entry): (TensorWeakRef(entry.grad), _version(entry.grad))
            for entry in params
            if entry.grad is not None
        }
        self.was_stepped_with = False

    def are_gone(self, params: Sequence[Tensor]) -> bool:
        """Whether none of them is the gradient of a parameter any more."""
        return not any(self._is_known(entry) for entry in params)

    def are_intact(self, params: Sequence[Tensor]) -> bool:
        """Whether all gradients are among them, and as they were."""
        return all(
            self._is_known(entry) and self._known[id(entry)][1] == _version(entry.grad)
            for entry in params
            if entry.grad is not None
        )

    def _is_known(self, entry: Tensor) -> bool:
        known = self._known.get(id(entry))
        return known is not None and entry.grad is not None and known[0]() is entry.grad


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version


def leave_stamp(method: Method) -> None:
    """From now until the step, the gradients of `method` are to stay as they are."""
    _register()
    _stamps[method] = method._state.plan.gradient_stamp(), _steps.setdefault(method, 0)


def has_stamp(method: Method) -> bool:
    """Whether the gradients of `method` are as they were when it left a stamp."""
    stamp, _ = _stamps.get(method, (None, 0))
    return stamp == method._state.plan.gradient_stamp()


def mark_clipped(method: Method) -> None:
    """The factors that `method` has kept are those of the gradients as they are now."""
    _register()
    _clipped[method] = Clipped(method._state.params)


def forget_clipped(method: Method) -> None:
    """No gradient is clipped any more."""
    _clipped.pop(method, None)


def is_clipped(method: Method) -> bool:
    """Whether the gradients of `method` are those that it has clipped.

    Raises:
        RuntimeError: they are, but were changed since (or some are and others are not), and no step
            was taken with them in between.
    """
    clipped, params = _clipped.get(method), method._state.params
    if clipped is None or clipped.are_gone(params):
        return False
    if clipped.are_intact(params):
        return True
    if clipped.was_stepped_with:
        return False
    raise RuntimeError(
        f"{method.name}: the gradients were changed after clip_grad_norm_(), so what it multiplied "
        "them with is no longer that of all of the gradient: call clip_grad_norm_ last before the "
        "step, and to drop gradients call zero_grad(set_to_none=True)"
    )


def is_clipped_by_now(method: Method) -> bool:
    """The same once a step was taken with them, which may have written to them."""
    clipped = _clipped.get(method)
    return clipped is not None and not clipped.are_gone(method._state.params)


def was_stepped_with(method: Method) -> bool:
    """Whether an optimizer has begun a step with the clipped gradients."""
    clipped = _clipped.get(method)
    return clipped is not None and clipped.was_stepped_with


def _register() -> None:
    global _is_registered
    if not _is_registered:
        register_optimizer_step_pre_hook(_before_a_step)
        register_optimizer_step_post_hook(_after_a_step)
        _is_registered = True


def warn_of_an_early_update(method: Method) -> None:
    """If `update` is called ahead of the step: it then pairs a step with the next gradient.

    So it is if there was a step since the last `update`, but none since the pull.
    """
    steps = _steps.get(method, 0)
    _, at_the_pull = _stamps.get(method, (None, None))
    if steps == at_the_pull and steps != _updates.get(method, steps):
        warnings.warn(
            f"clext: update() of this {method.name} was called before the optimizer's step, so it "
            "takes the last step for one along the gradient of this batch; call it after "
            "optimizer.step() and before zero_grad()",
            stacklevel=4,
        )
    _updates[method] = steps


def drop_stamp(method: Method) -> None:
    """The step is over, or there was none."""
    _stamps.pop(method, None)


def _before_a_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    for method in dict.fromkeys([*_stamps.keys(), *_clipped.keys()]):
        if _has_parameters_of(optimizer, method):
            _compare(method)
            _check_clipped(method)


def _after_a_step(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    for method in list(_steps.keys()):
        if _has_parameters_of(optimizer, method):
            note_step(method)


def note_step(method: Method) -> None:
    """There was a step with the gradients of `method`."""
    _steps[method] = _steps.get(method, 0) + 1


def _has_parameters_of(optimizer: Optimizer, method: Method) -> bool:
    known = method._state.ids
    return any(id(entry) in known for group in optimizer.param_groups for entry in group["params"])


def _compare(method: Method) -> None:
    if method not in _stamps:
        return
    # Once: the step of a first optimizer may write to gradients that a second one steps with.
    stamp, _ = _stamps.pop(method)
    if method._state.plan.gradient_stamp() != stamp:
        raise RuntimeError(
            f"{method.name}: the gradients were changed between add_penalty_grad_() and the "
            "optimizer's step, so the penalty's share can no longer be taken out of the path "
            f"integral: to clip, call clip_grad_norm_() of this {method.name} instead of "
            "torch's; unscale, accumulate and edit before add_penalty_grad_()"
        )


def _check_clipped(method: Method) -> None:
    clipped = _clipped.get(method)
    if clipped is None or clipped.was_stepped_with:
        return
    if is_clipped(method):
        clipped.was_stepped_with = True
    else:
        method._forget_scales()
