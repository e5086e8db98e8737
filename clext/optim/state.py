"""The state of an optimizer's parameters: float32 (float64) tensors in flat buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.lists import same_layout, state_dtype
from clext.core.parameters import allocate_state

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

State = dict[str, Any]


def without_state(
    states: MutableMapping[Tensor, State], params: Sequence[Tensor], keys: Sequence[str]
) -> list[Tensor]:
    """Those of `params` that lack a tensor for one of `keys`, or have one that is laid out anew."""
    return [
        entry
        for entry in params
        if not all(_is_usable(entry, key, states.get(entry, {}).get(key)) for key in keys)
    ]


def _is_usable(parameter: Tensor, key: str, value: object) -> bool:
    """False for what `allocate_states` can mend; a wrong shape is an error that the plan names."""
    if not isinstance(value, Tensor):
        return False
    expected = () if key == "step" else parameter.shape
    if value.shape != expected:
        return key != "step" or value.numel() != 1
    return (
        value.dtype == state_dtype(parameter.dtype)
        and value.device == parameter.device
        and (key == "step" or same_layout(value.shape, value.stride(), parameter.stride()))
    )


def check_state(parameter: Tensor, state: State) -> None:
    """Raise ValueError for a tensor that is neither a number nor shaped like its parameter."""
    for key, value in state.items():
        if isinstance(value, Tensor):
            fits = value.numel() == 1 if key == "step" else value.shape == parameter.shape
            if not fits:
                raise ValueError(
                    f"state {key!r} has shape {list(value.shape)}, expected "
                    f"{[] if key == 'step' else list(parameter.shape)}"
                )


@torch.no_grad()
def allocate_states(
    states: MutableMapping[Tensor, State], params: Sequence[Tensor], keys: Sequence[str]
) -> None:
    """Give `params`, which share a device, new state that holds what they had, zeros otherwise.

    What they had may be of torch.optim: of another dtype or layout, and, for SGD, without "step".
    """
    if not params or not keys:
        return
    scalars = [entry.new_empty(()) for entry in params]
    lists = {key: allocate_state(scalars if key == "step" else params) for key in keys}
    for index, parameter in enumerate(params):
        old = states.get(parameter, {})
        new = {key: lists[key][index] for key in keys}
        for key, entry in new.items():
            value = old.get(key)
            if key == "step" and value is None:
                # torch's SGD counts nothing: a momentum buffer has seen at least one step.
                value = float(any(isinstance(old.get(other), Tensor) for other in keys))
            if isinstance(value, Tensor):
                entry.copy_(value.reshape(entry.shape))
            elif value is not None:
                entry.fill_(value)
        states[parameter] = {**old, **new}
