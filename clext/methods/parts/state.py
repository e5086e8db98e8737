"""The state of the parameters that a method protects: one list of tensors per name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from clext import ops
from clext.core.lists import same_layout, state_dtype
from clext.core.parameters import allocate_state, canonical_names, memory_of
from clext.core.sharding import Mesh, is_sharded, local, number_of_parts, part_of, sharded_as, whole
from clext.ops.plan import make_plan
from clext.ops.reference.arithmetic import maximum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.ops.plan import ReferencePlan

# What a task leaves and the steps after it only read: these may be in bfloat16.
CONSOLIDATED = ("anchor", "importance")
# These begin as a copy of the parameters, all other state as zeros.
COPIES_OF_PARAMETERS = ("anchor", "interval_start")
ALL_FROZEN = (
    "all parameters that the method knows are frozen, so it protects nothing; unfreeze them, or "
    "call refresh_parameters() where others have taken their place"
)
# What a step keeps from the pull to its end; in no state dict.
SCRATCH = ("task_gradient", "step_start")


class StateView(Mapping[str, Tensor]):
    """The tensors of one list by parameter name: the state itself, and open to be written."""

    def __init__(self, label: str, tensors: Mapping[str, Tensor]) -> None:
        self._label, self._tensors = label, tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.assign({name: value})

    @torch.no_grad()
    def assign(self, values: Mapping[str, Tensor]) -> None:
        """Write these values; ValueError for a name or a shape that is not the state's."""
        for name, value in values.items():
            if name not in self._tensors:
                raise ValueError(f"{self._label} has no entry {name!r}: no such parameter")
            own = self._tensors[name]
            if not isinstance(value, Tensor) or value.shape != own.shape:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{self._label}[{name!r}] is {got}, expected {list(own.shape)}")
        for name, value in values.items():
            own = self._tensors[name]
            local(own).copy_(part_of(own, value))


class ParameterState:
    """Parameters by name, one list of state tensors per key, and the plan over both.

    Where parameters are sharded over processes, the lists hold this one's parts of the state.

    Args:
        named: the parameters.
        keys: names of the lists.
        dtype: of anchor and importance; None: the state dtype of each parameter, as all else is.

    Raises:
        ValueError: there is a `dtype`, and a parameter is float64.
    """

    def __init__(
        self, named: Mapping[str, Tensor], keys: Sequence[str], dtype: torch.dtype | None = None
    ) -> None:
        self.names, self.params, self.dtype = list(named), list(named.values()), dtype
        for name, entry in named.items():
            if dtype is not None and entry.dtype == torch.float64:
                raise ValueError(
                    f"parameter '{name}' is float64, whose state is float64: leave "
                    f"state_dtype={dtype} out"
                )
        self.mesh = Mesh(self.params)
        self.is_sharded = bool(self.mesh)
        self.lists = {
            key: allocate_state(self.local, dtype if key in CONSOLIDATED else None) for key in keys
        }
        self.scratch: dict[str, list[Tensor]] = {}
        for key in COPIES_OF_PARAMETERS:
            if key in self.lists:
                self.restart(key)

    @property
    def local(self) -> list[Tensor]:
        """What this process has of the parameters."""
        return [local(entry) for entry in self.params]

    @cached_property
    def plan(self) -> ReferencePlan:
        """The ops over these lists; made when first used: never in a loss that is compiled."""
        return make_plan(self.names, self.params, {**self.lists, **self.scratch})

    def keep_steps(self) -> None:
        """From now on the pull also keeps the task's gradient and the parameters: see `SCRATCH`."""
        self.scratch = {key: allocate_state(self.local) for key in SCRATCH}
        self.__dict__.pop("plan", None)

    def view(self, key: str) -> StateView:
        """The tensors of `key` by parameter name."""
        parts = zip(self.names, self.params, self.lists[key], strict=True)
        return StateView(key, {name: sharded_as(like, part) for name, like, part in parts})

    def penalty(self, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """Sum of importance * (parameter - anchor)^2, 0-dim, differentiable.

        Frozen parameters without a gradient have no part in it; ValueError if there are no others.
        `given`: values in place of the parameters of these names.
        """
        values = given or {}
        moving = [
            name in values or entry.requires_grad or entry.grad is not None
            for name, entry in zip(self.names, self.params, strict=True)
        ]
        if not any(moving):
            raise ValueError(ALL_FROZEN)
        params = [values.get(*pair) for pair in zip(self.names, self.params, strict=True)]
        lists = (params, self.lists["anchor"], self.lists["importance"])
        chosen = [list(compress(entries, moving)) for entries in lists]
        return self._sharded_penalty(*chosen) if self.is_sharded else ops.quadratic_penalty(*chosen)

    def add_penalty_grad_(self, strength: float) -> Tensor:
        """Add the gradient of strength * penalty to every `.grad`; returns the value (0-dim)."""
        return self.plan.add_quadratic_penalty_grad_(strength)

    def protects(self, parameter: Tensor) -> bool:
        """Whether it is known, and some of it important."""
        found = [k for k, entry in enumerate(self.params) if entry is parameter]
        return bool(found) and bool(self.mesh.any(self.lists["importance"][found[0]].any()))

    def _sharded_penalty(
        self, params: list[Tensor], anchors: list[Tensor], importances: list[Tensor]
    ) -> Tensor:
        """The penalty of all parts, whose gradient by each is that of its own."""
        value: Any = 0.0
        for theta, *rest in zip(params, anchors, importances, strict=True):
            part = theta.to_local() if is_sharded(theta) else theta  # type: ignore[attr-defined]
            own = ops.quadratic_penalty([part], *([entry] for entry in rest))
            shared = self.mesh.share(own.detach(), number_of_parts(theta))
            value = value + own + (shared - own.detach())
        others = whole(self.mesh.total(value.detach())) - value.detach()
        return cast("Tensor", value + others)

    def largest(self, entries: Sequence[Tensor]) -> Tensor:
        """The largest element of such a list, of all processes."""
        return self.mesh.largest(entries) if self.is_sharded else maximum(entries)

    @torch.no_grad()
    def restart(self, key: str) -> None:
        """Make the list `key` a copy of the parameters as they are now."""
        entries = self.lists.get(key) or self.scratch[key]
        for entry, parameter in zip(entries, self.local, strict=True):
            entry.copy_(parameter)

    def has_moved(self) -> bool:
        """Whether the parameters are not where the step that is kept began."""
        starts = self.scratch["step_start"]
        pairs = zip(starts, self.local, strict=True)
        return not all(torch.equal(start, entry.to(start.dtype)) for start, entry in pairs)

    def check_finite(self, owner: str, keys: Sequence[str]) -> None:
        """ValueError if a parameter or the state `keys` is not finite: importance is made of it."""
        for key, entries in {"parameter": self.local, **{k: self.lists[k] for k in keys}}.items():
            broken = torch.stack([~entry.isfinite().all() for entry in entries])
            found = self.mesh.any(broken).tolist()
            if any(found):
                raise ValueError(
                    f"{owner}: {key} '{self.names[found.index(True)]}' holds NaN or infinity, "
                    "which a step with such a gradient has left: go back to state dicts of the "
                    "model and the method saved before it"
                )

    def fits(self, named: Mapping[str, Tensor]) -> bool:
        """Whether `named` are the very parameters, still laid out as when the state was made."""
        if list(named) != self.names:
            return False
        if any(new is not old for new, old in zip(named.values(), self.params, strict=True)):
            return False
        return all(
            entry.shape == parameter.shape
            and entry.device == parameter.device
            and entry.dtype == self._dtype_of(key, parameter)
            and same_layout(entry.shape, entry.stride(), parameter.stride())
            for key, entries in self.lists.items()
            for entry, parameter in zip(entries, self.local, strict=True)
        )

    def _dtype_of(self, key: str, parameter: Tensor) -> torch.dtype:
        wide = state_dtype(parameter.dtype)
        if self.dtype is None or key not in CONSOLIDATED or wide == torch.float64:
            return wide
        return self.dtype

    @torch.no_grad()
    def adopt(self, old: ParameterState, owner: str) -> list[str]:
        """Take over what `old` knows; returns the names of parameters that are not here any more.

        A parameter that has only got another name (its layer was wrapped, or another one put before
        it) is itself; one in the place of another, by its name, takes over the other's. Where it
        has grown (a head with more classes) the leading part keeps its state, the rest starts anew.

        Raises:
            ValueError: a parameter has shrunk, or has another number of dimensions.
        """
        same = {id(parameter): place for place, parameter in enumerate(old.params)}
        here = set(map(id, self.params))
        by_name = {
            name: place for place, name in enumerate(old.names) if id(old.params[place]) not in here
        }
        places = [
            same.get(id(parameter), by_name.get(name))
            for name, parameter in zip(self.names, self.params, strict=True)
        ]
        for key in self.lists.keys() & old.lists.keys():
            for name, place in zip(self.names, places, strict=True):
                if place is not None:
                    known, now = old.view(key)[old.names[place]], self.view(key)[name]
                    before, after = whole(known), whole(now)  # entry itself, if it is not sharded
                    after[_leading_part(owner, name, before, after)].copy_(before)
                    local(now).copy_(part_of(now, after))
        return [name for place, name in enumerate(old.names) if place not in places]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies of all lists, by parameter name."""
        return {
            key: {name: entry.clone() for name, entry in self.view(key).items()}
            for key in self.lists
        }

    def load_state_dict(self, given: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over such copies, whatever wrappers' prefixes; ValueError for other parameters."""
        for key in self.lists:
            entries = canonical_names(given[key])
            if set(entries) != set(self.names):
                odd = sorted(set(entries) ^ set(self.names))
                raise ValueError(f"'{key}' is of other parameters: {', '.join(odd)}")
            self.view(key).assign(entries)

    def __getstate__(self) -> dict[str, Any]:
        # The memory of a list as a whole, since its tensors are parts of it: pickle would write it
        # for each of them. No copies: what goes to another process has to live until it has come.
        return {
            "named": dict(zip(self.names, self.params, strict=True)),
            "dtype": self.dtype,
            "memory": {key: memory_of(entries) for key, entries in self.lists.items()},
            "places": {
                key: [(e.dtype, e.shape, e.stride(), e.storage_offset()) for e in entries]
                for key, entries in self.lists.items()
            },
        }

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        # Parameters may have another layout by now than their state had.
        keys = list(state["memory"])
        self.__init__(state["named"], keys, state["dtype"])  # type: ignore[misc]
        for key, entries in self.lists.items():
            memory = {buffer.dtype: buffer for buffer in state["memory"][key]}
            for entry, (dtype, *place) in zip(entries, state["places"][key], strict=True):
                entry.copy_(memory[dtype].as_strided(*place))


def _leading_part(owner: str, name: str, old: Tensor, new: Tensor) -> tuple[slice, ...]:
    """Where `old` lies in `new`; ValueError unless it fits in."""
    if old.dim() != new.dim() or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
        raise ValueError(
            f"{owner}: parameter '{name}' had shape {list(old.shape)} and now has "
            f"{list(new.shape)}: what is known of it can be kept only where no dimension gets "
            "smaller; give the new parameter another name, or make a new method for this model"
        )
    return tuple(slice(size) for size in old.shape)
