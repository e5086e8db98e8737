"""The options of a method: their names and values, and how it is described."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clext.core.checks import number, suggestion
from clext.core.supervision import SupervisionOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clext.methods.base import Method


_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def option_names(kind: type[Method]) -> list[str]:
    """The options of a method: what it takes beside the model; strength where it has one.

    What a class takes as keywords that it does not describe belongs to the class above it.
    """
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if make := vars(base).get("__init__"):
            parameters = inspect.signature(make).parameters.values()
            names |= dict.fromkeys(e.name for e in parameters if e.kind in _NAMED)
            if not any(e.kind is e.VAR_KEYWORD and e.annotation is e.empty for e in parameters):
                break
    names = {name: None for name in names if name not in ("self", "model")}
    return [name for name in names if name != "strength" or kind.has_strength]


def check_options(kind: type[Method], given: Mapping[str, object]) -> None:
    """TypeError for what is left of the keywords and none of `SupervisionOptions`."""
    for name in given.keys() - SupervisionOptions.__annotations__.keys():
        valid = [*option_names(kind), *SupervisionOptions.__annotations__]
        raise TypeError(
            f"{kind.__name__} has no option {name!r}; its options are {', '.join(valid)}"
            f"{suggestion(name, valid)}"
        )


def checked_strength(kind: type[Method], given: object) -> float:
    """The strength, by default the method's own; ValueError if it is none, or has no use."""
    if given is None:
        return kind.default_strength
    strength = number(kind.name, "strength", given, minimum=0.0)
    if strength != 0 and not kind.has_strength:
        raise ValueError(f"{kind.name} has no penalty, so no strength; leave it out")
    return strength


def checked_state_dtype(owner: str, given: object) -> torch.dtype | None:
    """torch.bfloat16, by its name too, or None; ValueError for anything else."""
    name = str(given).removeprefix("torch.")
    if name not in ("None", "bfloat16"):
        raise ValueError(f"{owner}: state_dtype must be torch.bfloat16 or None, got {given!r}")
    return torch.bfloat16 if name == "bfloat16" else None


def scale_of(scaler: Any) -> float:  # noqa: ANN401
    """By what gradients are scaled: of a GradScaler that has not unscaled them, or a number."""
    if not hasattr(scaler, "get_scale"):
        return 1.0 if scaler is None else float(scaler)
    states = scaler._per_optimizer_states.values()
    is_unscaled = any(state["stage"].name == "UNSCALED" for state in states)
    return 1.0 if is_unscaled else float(scaler.get_scale())


def described(method: Method) -> str:
    """Class, options and counts, as `repr` shows them."""
    values = {name: getattr(method, name) for name in option_names(type(method))}
    options = [
        f"{name}={type(value).__name__ if isinstance(value, nn.Module) else repr(value)}"
        for name, value in values.items()
    ]
    options += [f"tasks={method.tasks}", f"steps={method.steps}"]
    size = sum(entry.numel() for entry in method.model.parameters() if entry.requires_grad)
    return f"{type(method).__name__}({', '.join(options)}; {size:,} parameters)"


def warn_if_unused(method: Method, steps: int) -> None:
    """Say so if the method had no part in the steps of the task that has just ended."""
    if steps > 0 or (method.tasks == 1 and not method.needs_first_task):
        return
    if method.has_penalty:
        remedy = (
            "give it to an optimizer of clext.optim, attach() it to another one, or call "
            "add_penalty_grad_() before each step and update() after it"
        )
    elif method.has_own_loss:
        remedy = "train on loss(x, y) of the method in place of a loss of your own"
    else:
        return
    warnings.warn(
        f"clext: {method.name} saw no step of this task, which went on as without it; {remedy}",
        stacklevel=3,
    )
