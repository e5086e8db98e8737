"""The inputs of a model: a tensor, or tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A tensor or a nesting of them. Each has a row for every sample; 0-dim tensors, and whatever is no
# tensor, belong to all samples.
Inputs = Any


def mapped(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same nesting of function(tensor); a mapping of any kind comes back as a dict."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        # In one order, however a loader makes its batches.
        return {name: mapped(function, inputs[name]) for name in sorted(inputs, key=str)}
    if isinstance(inputs, tuple | list):
        entries = [mapped(function, entry) for entry in inputs]
        return type(inputs)(*entries) if hasattr(inputs, "_fields") else type(inputs)(entries)
    if dataclasses.is_dataclass(inputs) and not isinstance(inputs, type):
        made = copy.copy(inputs)
        for field in dataclasses.fields(inputs):
            value = mapped(function, getattr(inputs, field.name))
            object.__setattr__(made, field.name, value)
        return made
    return inputs


def flatten(inputs: Inputs) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Inputs]]:
    """The tensors with rows, and what puts others in their place."""
    if isinstance(inputs, Tensor):
        found = [inputs] if inputs.dim() > 0 else []
        return found, lambda tensors: tensors[0] if tensors else inputs
    found = []

    def collect(tensor: Tensor) -> Tensor:
        if tensor.dim() > 0:
            found.append(tensor)
        return tensor

    mapped(collect, inputs)

    def rebuild(tensors: Sequence[Tensor]) -> Inputs:
        following = iter(tensors)
        return mapped(lambda old: next(following) if old.dim() > 0 else old, inputs)

    return found, rebuild


def rows(inputs: Inputs) -> int:
    """How many samples there are; ValueError if there is no tensor, or their numbers differ."""
    counts = {len(tensor) for tensor in flatten(inputs)[0]}
    if len(counts) != 1:
        raise ValueError(
            f"inputs are {described(inputs)}, expected tensors with a row for each sample, as many "
            "rows in each"
        )
    return counts.pop()


def taken(inputs: Inputs, index: Tensor | slice) -> Inputs:
    """The samples at `index`."""
    return mapped(lambda tensor: tensor[index] if tensor.dim() > 0 else tensor, inputs)


def split(inputs: Inputs, size: int | list[int]) -> list[Inputs]:
    """So many samples at a time."""
    tensors, rebuild = flatten(inputs)
    return [rebuild(some) for some in zip(*(t.split(size) for t in tensors), strict=True)]


def concatenated(parts: Sequence[Inputs]) -> Inputs:
    """All samples of several inputs alike."""
    lists = [flatten(part)[0] for part in parts]
    rebuild = flatten(parts[0])[1]
    return rebuild([torch.cat(column) for column in zip(*lists, strict=True)])


def is_plain(inputs: Inputs) -> bool:
    """Whether torch.load takes them back: no class of somebody's own is in them."""
    if isinstance(inputs, Mapping):
        return all(map(is_plain, inputs.values()))
    if isinstance(inputs, tuple | list):
        return not hasattr(inputs, "_fields") and all(map(is_plain, inputs))
    return not dataclasses.is_dataclass(inputs)


def one_tensor(owner: str, inputs: Inputs) -> Tensor:
    """The inputs; ValueError if they are more than one tensor."""
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"{owner}: inputs are {described(inputs)}, expected one tensor, which this method needs"
        )
    return inputs


def described(entry: object) -> str:
    """What was given, for errors."""
    if isinstance(entry, Tensor):
        return f"{entry.dtype} {list(entry.shape)}"
    if isinstance(entry, Mapping):
        inside = ", ".join(f"{name}: {described(value)}" for name, value in entry.items())
        return f"{{{inside}}}"
    size = f" of {len(entry)} entries" if isinstance(entry, tuple | list) else ""
    return "nothing" if entry is None else f"{type(entry).__name__}{size}"
