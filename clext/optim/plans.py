"""The plans of an optimizer, over what has a gradient, made anew when anything has changed."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.parameters import check_parameters
from clext.ops.plan import make_plan
from clext.optim.state import allocate_states, without_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.methods.parts.state import ParameterState
    from clext.ops.plan import ReferencePlan
    from clext.optim.base import FusedOptimizer

Group = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """Parameters of one group and device that the method protects, or that it does not."""

    group: Group
    device: torch.device
    first: Tensor  # of the parameters
    plan: ReferencePlan


@dataclass(frozen=True)
class _Protection:
    """What the pass works on of a method's state, and where parameters have theirs."""

    keys: tuple[str, ...]
    state: ParameterState | None

    @property
    def places(self) -> dict[Tensor, int]:
        return {entry: i for i, entry in enumerate(self.state.params)} if self.state else {}


class Plans:
    """Up to two plans per group and device; a parameter joins with its first gradient."""

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._made_for: list[object] = []
        self._keys: list[tuple[str, ...]] = []
        self._joined: set[Tensor] = set()  # parameters that have had a gradient
        self._waiting: list[Tensor] = []  # those that have had none

    def current(self, optimizer: FusedOptimizer) -> list[Part]:
        """The plans for a step of `optimizer`."""
        protection = _protection(optimizer)
        keys = [optimizer._state_keys(group) for group in optimizer.param_groups]
        if (
            keys != self._keys
            or not identical(self._made_for, _circumstances(optimizer, protection))
            or any(part.first.device != part.device for part in self._parts)  # model.cuda()
            or any(entry.grad is not None for entry in self._waiting)
        ):
            self._made_for, self._parts, self._waiting = [], [], []
            for number, group in enumerate(optimizer.param_groups):
                self._add_group(optimizer, number, group, protection)
            self._made_for, self._keys = _circumstances(optimizer, protection), keys
        return self._parts

    def _add_group(
        self, optimizer: FusedOptimizer, number: int, group: Group, protection: _Protection
    ) -> None:
        params = group["params"]
        names = group.get("param_names") or [f"{i} of group {number}" for i in range(len(params))]
        places = protection.places
        buckets: dict[tuple[torch.device, bool], list[tuple[str, Tensor]]] = {}
        for name, entry in zip(names, params, strict=True):
            if entry.grad is None and entry not in self._joined and not optimizer.state.get(entry):
                self._waiting.append(entry)
                continue
            _check_gradient(name, entry, optimizer)
            self._joined.add(entry)
            known = entry in places
            if protection.state is not None and known:
                name = protection.state.names[places[entry]]
            buckets.setdefault((entry.device, known), []).append((name, entry))
        for (device, known), named in buckets.items():
            check_parameters(named, type(optimizer).__name__)
            entries = [entry for _, entry in named]  # names need not be unique, in torch neither
            lists = _own_state(optimizer, entries, optimizer._state_keys(group))
            steps = lists.pop("step", [])
            if protection.state is not None and known:
                for key in protection.keys:
                    kept = protection.state.lists[key]
                    lists[key] = [kept[places[entry]] for entry in entries]
            plan = make_plan([name for name, _ in named], entries, lists, steps)
            self._parts.append(Part(group, device, entries[0], plan))


def _protection(optimizer: FusedOptimizer) -> _Protection:
    """None before there is anything to protect or to follow."""
    method = optimizer.method
    if method is None or not method.fused_state:
        return _Protection((), None)
    is_empty = method.tasks == 0 and not method._has_been_given_importance
    if is_empty and "path" not in method.fused_state:
        return _Protection((), None)
    return _Protection(method.fused_state, method._state)


def _circumstances(optimizer: FusedOptimizer, protection: _Protection) -> list[object]:
    """All objects that plans depend on, beside the gradients."""
    objects: list[object] = [protection.state, optimizer.state]
    for group in optimizer.param_groups:
        objects.append(group)
        objects += group["params"]
    for state in optimizer.state.values():
        objects.append(state)
        objects += state.values()
    return objects


def identical(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _check_gradient(name: str, entry: Tensor, optimizer: FusedOptimizer) -> None:
    """Here rather than in the step, which could have moved other groups before it comes to this."""
    if entry.grad is not None and entry.grad.layout != torch.strided:
        raise TypeError(
            f"{type(optimizer).__name__}: gradient of parameter '{name}' has layout "
            f"{entry.grad.layout}, expected a dense (strided) tensor; build layers such as "
            "Embedding with sparse=False"
        )


def _own_state(
    optimizer: FusedOptimizer, params: list[Tensor], keys: tuple[str, ...]
) -> dict[str, list[Tensor]]:
    incomplete = without_state(optimizer.state, params, keys)
    if incomplete:
        # In a graph's memory, and set to zero again by each replay.
        optimizer._refuse_capture(
            "it would have to make state for parameters that have none yet; take a step before"
        )
        allocate_states(optimizer.state, incomplete, keys)
    return {key: [optimizer.state[entry][key] for entry in params] for key in keys}
