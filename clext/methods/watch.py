"""Gradients that somebody changes between a method's pull and the optimizer's step.

A method with a path integral takes the penalty's share out of `.grad` again. If the gradients were
clipped in between, say, what it takes out is not what is in there, and the rest would leak into the
importance. So the method leaves a stamp of the gradients here, and the step of any optimizer of
torch that has its parameters is preceded by a comparison. (It has to be before the step: fused
optimizers of torch write to the gradients while they step.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch.optim.optimizer import register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from clext.methods.base import Method

_stamps: WeakKeyDictionary[Method, int] = WeakKeyDictionary()
_is_registered = False


def leave_stamp(method: Method) -> int:
    """From now until the step, the gradients of `method` are to stay as they are; their stamp."""
    global _is_registered
    if not _is_registered:
        register_optimizer_step_pre_hook(_compare)
        _is_registered = True
    stamp = _stamps[method] = method._state.plan.gradient_stamp()
    return stamp


def renew_stamp(method: Method) -> int:
    """The method has changed the gradients itself, and knows how; their stamp."""
    return leave_stamp(method) if method in _stamps else method._state.plan.gradient_stamp()


def drop_stamp(method: Method) -> None:
    """The step is over, or there was none."""
    _stamps.pop(method, None)


def _compare(optimizer: Optimizer, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
    for method, stamp in list(_stamps.items()):
        known = method._state.ids
        if not any(
            id(entry) in known for group in optimizer.param_groups for entry in group["params"]
        ):
            continue
        # Once: the step of a first optimizer may write to gradients that a second one steps with.
        drop_stamp(method)
        if method._state.plan.gradient_stamp() != stamp:
            raise RuntimeError(
                f"{method.name}: the gradients were changed between add_penalty_grad_() and the "
                "optimizer's step, so the penalty's share can no longer be taken out of the path "
                f"integral: to clip, call clip_grad_norm_() of this {method.name} instead of "
                "torch's; unscale, accumulate and edit before add_penalty_grad_()"
            )
