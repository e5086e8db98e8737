"""The plans of an optimizer over the parameters that have a gradient, and its state of them."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clext.core.checks import scalar
from clext.core.lists import same_layout, state_dtype
from clext.core.parameters import allocate_state
from clext.core.sharding import is_sharded, local, part_of, sharded_as
from clext.ops.plan import make_plan
from clext.optim.protector import state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from clext.ops.plan import ReferencePlan
    from clext.optim.protector import Protector

Group = dict[str, Any]
Keys = tuple[str, ...]
States = MutableMapping[Tensor, dict[str, Any]]


class Part(NamedTuple):
    """Parameters of one group and device, all of them protected by the method or none."""

    group: Group
    device: torch.device
    params: list[Tensor]
    keys: Keys  # of the optimizer's state
    plan: ReferencePlan


class Plans:
    """Up to two plans per group and device; a parameter joins, for good, with its first gradient.

    Then it gets what it lacks in the optimizer's `states`, of which `keys_of` a group has names.
    """

    def __init__(
        self, groups: Sequence[Group], states: States, keys_of: Callable[[Group], Keys]
    ) -> None:
        self._groups, self._states, self._keys_of = groups, states, keys_of
        self._parts: list[Part] = []
        self._made_with: object = None  # the state of the method
        self._waiting: list[Tensor] = [entry for group in groups for entry in group["params"]]
        self._sparse: list[Tensor] = []  # parameters whose first gradient was sparse

    def refresh(self, method: Protector | None) -> None:
        """Make the plans for a step with `method`, where those that there are do not serve."""
        if self._are_stale(method):
            if method is not None:
                method._follow_model()
            self._make(method)

    def fill_sparse_gradients(self, owner: str, is_taken: bool) -> None:
        """Make them dense: the pull, momentum and weight decay touch every row anyway.

        RuntimeError if they are not taken: the namesake of torch does not, either.
        """
        for entry in self._sparse:
            if entry.grad is not None and entry.grad.is_sparse:
                if not is_taken:
                    raise RuntimeError(
                        f"{owner} does not support sparse gradients, as torch.optim.{owner} does "
                        "not; build the layer (an Embedding, say) with sparse=False"
                    )
                entry.grad = entry.grad.to_dense()

    def each(
        self, method: Protector | None, step: Callable[[Part], Tensor | None]
    ) -> Iterator[Tensor | None]:
        """`step` of each in turn; of a model that was converted since, once more."""
        for place in range(len(self._parts)):
            try:
                yield step(self._parts[place])
            except (TypeError, ValueError):
                if not self._follow_conversion(method):
                    raise
                yield step(self._parts[place])

    def _follow_conversion(self, method: Protector | None) -> bool:
        """Whether parameters had another dtype or layout than their state; not any more."""
        known = state_of(method)
        if method is not None:
            method._follow_model()
        own = ((entry, self._states[entry]) for part in self._parts for entry in part.params)
        if state_of(method) is known and all(
            _is_laid_out_for(entry, value) for entry, state in own for value in state.values()
        ):
            return False
        self._make(method)
        return True

    def _are_stale(self, method: Protector | None) -> bool:
        if state_of(method) is not self._made_with:
            return True
        for entry in self._waiting:
            if entry.grad is not None:
                return True
        for part in self._parts:  # model.cuda(), or momentum that was switched on
            if part.params[0].device != part.device or self._keys_of(part.group) != part.keys:
                return True
        return False

    def _make(self, method: Protector | None) -> None:
        state = state_of(method)
        fused = method.fused if method is not None and method.fused else ()
        places = {entry: i for i, entry in enumerate(state.params)} if state else {}
        joined = {entry for part in self._parts for entry in part.params}
        self._sparse += [p for p in self._waiting if p.grad is not None and p.grad.is_sparse]
        parts, waiting = [], []
        for number, group in enumerate(self._groups):
            keys = self._keys_of(group)
            buckets: dict[tuple[torch.device, bool], list[int]] = {}
            for index, entry in enumerate(group["params"]):
                if entry.grad is None and entry not in joined:
                    waiting.append(entry)
                else:
                    buckets.setdefault((entry.device, entry in places), []).append(index)
            for (device, is_known), chosen in buckets.items():
                params = [group["params"][i] for i in chosen]
                lists = self._own_lists(params, keys)
                steps = lists.pop("step", [])
                if state is not None and is_known:
                    there = [places[entry] for entry in params]
                    names = [state.names[i] for i in there]
                    lists |= {key: [state.lists[key][i] for i in there] for key in fused}
                else:
                    given = group.get("param_names")
                    names = [given[i] if given else f"{i} of group {number}" for i in chosen]
                plan = make_plan(names, params, lists, steps)
                parts.append(Part(group, device, params, keys, plan))
        self._parts, self._waiting, self._made_with = parts, waiting, state

    def _own_lists(self, params: list[Tensor], keys: Keys) -> dict[str, list[Tensor]]:
        lacking = [p for p in params if not set(keys) <= self._states.get(p, {}).keys()]
        if lacking:
            # In a graph's memory, and set to zero again by each replay.
            refuse_capture("it would have to make state for new parameters; take a step before")
            _allocate(self._states, lacking, keys)
        for key in keys:
            for entry in params:
                if not _is_laid_out_for(entry, self._states[entry][key]):
                    self._states[entry][key] = fitted(entry, key, self._states[entry][key])
        return {key: [self._states[entry][key] for entry in params] for key in keys}


def _allocate(states: States, params: Sequence[Tensor], keys: Keys) -> None:
    """Give `params`, which share a device, new state: zeros in flat buffers."""
    parts = [local(entry) for entry in params]
    scalars = [entry.new_empty(()) for entry in parts]
    lists = [allocate_state(scalars if key == "step" else parts) for key in keys]
    for entry, *values in zip(params, *lists, strict=True):
        own = {
            key: value if key == "step" else sharded_as(entry, value)
            for key, value in zip(keys, values, strict=True)
        }
        states[entry] = {**states.get(entry, {}), **own}


def _is_laid_out_for(parameter: Tensor, value: object) -> bool:
    """Whether the entry of a parameter's state is in its place: dtype, device, layout."""
    if not isinstance(value, Tensor):
        return True
    if value.dim() > 0 and is_sharded(value) != is_sharded(parameter):
        return False
    parameter, value = local(parameter), local(value)
    return (
        value.device == parameter.device
        and value.dtype == state_dtype(parameter.dtype)
        and (value.dim() == 0 or same_layout(value.shape, value.stride(), parameter.stride()))
    )


@torch.no_grad()
def fitted(parameter: Tensor, key: str, value: object) -> Tensor:
    """A copy of what should be a parameter's state, in its dtype and layout, else ValueError."""
    dtype, device = state_dtype(parameter.dtype), parameter.device
    if key == "step":
        count = scalar("state", key, value, minimum=0.0)
        return torch.full((), count, dtype=dtype, device=device)
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{key!r} is {got}, expected a tensor {list(parameter.shape)}")
    own = torch.empty_like(local(parameter), dtype=dtype).copy_(part_of(parameter, value))
    return sharded_as(parameter, own)


def refuse_capture(why: str) -> None:
    """RuntimeError while a CUDA graph is captured."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"clext.optim in the capture of a CUDA graph: {why}")
