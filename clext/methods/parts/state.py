"""A method's state for the parameters that it protects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.lists import same_layout, state_dtype
from clext.core.parameters import allocate_state
from clext.ops.plan import make_plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Where a movement is measured from: the last step, the start of an interval.
_STARTS = frozenset({"previous", "interval_start"})
# These begin as a copy of the parameters, all other state as zeros.
COPIES_OF_PARAMETERS = _STARTS | {"anchor"}


class ParameterState:
    """Parameters by name, one list of state tensors per key, and the plan over both."""

    def __init__(self, named: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        self.names = list(named)
        self.params = list(named.values())
        self.ids = frozenset(map(id, self.params))
        self.lists = {key: allocate_state(self.params) for key in keys}
        for key in COPIES_OF_PARAMETERS:
            self.restart(key)
        self.plan = make_plan(self.names, self.params, self.lists)

    def __getstate__(self) -> dict[str, Any]:
        # Tensors of their own: pickle would write all of their common memory for each.
        own = {key: [entry.clone() for entry in entries] for key, entries in self.lists.items()}
        return {"names": self.names, "params": self.params, "lists": own}

    @torch.no_grad()
    def __setstate__(self, state: dict[str, Any]) -> None:
        self.names, self.params = state["names"], state["params"]
        self.lists = {key: allocate_state(self.params) for key in state["lists"]}
        for key, entries in self.lists.items():
            for entry, kept in zip(entries, state["lists"][key], strict=True):
                entry.copy_(kept)
        self.ids = frozenset(map(id, self.params))
        self.plan = make_plan(self.names, self.params, self.lists)

    def view(self, key: str) -> dict[str, Tensor]:
        """The tensors of `key` by parameter name (empty for a key that is not kept)."""
        return dict(zip(self.names, self.lists.get(key, ()), strict=key in self.lists))

    def restart(self, key: str) -> None:
        """Make the state `key`, where it is kept, a copy of the parameters as they are now."""
        if key in self.lists:
            with torch.no_grad():
                for entry, parameter in zip(self.lists[key], self.params, strict=True):
                    entry.copy_(parameter)

    def broken(self, keys: Sequence[str]) -> str:
        """Which of the parameters, or of the state `keys`, is not finite; "" if all are."""
        lists = {"parameter": self.params} | {key: self.lists[key] for key in keys}
        for key, entries in lists.items():
            finite = torch.stack([entry.isfinite().all() for entry in entries]).tolist()
            if not all(finite):
                name = self.names[finite.index(False)]
                return f"{key} '{name}'" if key == "parameter" else f"{key} of parameter '{name}'"
        return ""

    def drop(self, keys: Sequence[str]) -> None:
        """Keep these lists no longer: their memory is given back."""
        if self.lists.keys() & set(keys):
            for key in keys:
                self.lists.pop(key, None)
            self.plan = make_plan(self.names, self.params, self.lists)

    def unknown(self, named: Mapping[str, Tensor]) -> list[str]:
        """Names of what is none of these parameters: added, or put in the place of one."""
        return [name for name, parameter in named.items() if id(parameter) not in self.ids]

    def fits(self, named: Mapping[str, Tensor]) -> bool:
        """Whether `named` are the very parameters, still laid out as when the state was made."""
        if list(named) != self.names:
            return False
        if any(new is not old for new, old in zip(named.values(), self.params, strict=True)):
            return False
        return all(
            entry.shape == parameter.shape
            and entry.device == parameter.device
            and entry.dtype == state_dtype(parameter.dtype)
            and same_layout(entry.shape, entry.stride(), parameter.stride())
            for entries in self.lists.values()
            for entry, parameter in zip(entries, self.params, strict=True)
        )

    def origins(self, old: ParameterState) -> list[int | None]:
        """The place in `old` of each parameter: of itself, else of what had its name and is gone.

        So a parameter that has only got another name (its layer was wrapped, or another one put
        before it) stays what it is.
        """
        itself = {id(parameter): place for place, parameter in enumerate(old.params)}
        replaced = {
            name: place
            for place, (name, parameter) in enumerate(zip(old.names, old.params, strict=True))
            if id(parameter) not in self.ids
        }
        return [
            itself.get(id(parameter), replaced.get(name))
            for name, parameter in zip(self.names, self.params, strict=True)
        ]

    def lost(self, old: ParameterState) -> list[str]:
        """Names in `old` of parameters that are not here, neither themselves nor replaced."""
        known = set(self.origins(old))
        return [name for place, name in enumerate(old.names) if place not in known]

    @torch.no_grad()
    def adopt(self, old: ParameterState) -> None:
        """Copy what `old` knows of these parameters (see `origins`).

        Where a parameter has grown (a head with more classes), the leading part keeps its state
        and the rest starts anew. Being given other values is not a movement: where a movement is
        measured from changes alike.

        Raises:
            ValueError: a parameter has shrunk, or has another number of dimensions.
        """
        places = self.origins(old)
        for key, entries in self.lists.items():
            for name, parameter, entry, place in zip(
                self.names, self.params, entries, places, strict=True
            ):
                if place is None or key not in old.lists:
                    continue
                known, before = old.lists[key][place], old.params[place]
                leading = _leading_part(name, known, entry)
                entry[leading].copy_(known)
                if key in _STARTS and before is not parameter:
                    jump = parameter[leading].to(entry) - before.to(entry)
                    entry[leading].add_(jump)


def _leading_part(name: str, old: Tensor, new: Tensor) -> tuple[slice, ...]:
    """Where `old` lies in `new`; ValueError unless it fits in."""
    if old.dim() != new.dim() or any(a > b for a, b in zip(old.shape, new.shape, strict=True)):
        raise ValueError(
            f"parameter '{name}' had shape {list(old.shape)} and now has {list(new.shape)}: "
            "what is known of it can be kept only where no dimension gets smaller; give the new "
            "parameter another name, or make a new method for this model"
        )
    return tuple(slice(size) for size in old.shape)
