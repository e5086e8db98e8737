"""A method's state for the parameters that it protects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.parameters import allocate_state, make_plan
from clext.tensor_lists import same_layout, state_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# These begin as a copy of the parameters, all other state as zeros.
COPIES_OF_PARAMETERS = frozenset({"anchor", "previous", "interval_start"})


class ParameterState:
    """Parameters by name, one list of state tensors per key, and the plan over both."""

    def __init__(self, named: Mapping[str, Tensor], keys: Sequence[str]) -> None:
        self.names = list(named)
        self.params = list(named.values())
        self.lists = {key: allocate_state(self.params) for key in keys}
        for key in COPIES_OF_PARAMETERS:
            self.restart(key)
        self.plan = make_plan(self.names, self.params, self.lists)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a copy, or what was pickled
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

    def drop(self, keys: Sequence[str]) -> None:
        """Keep these lists no longer: their memory is given back."""
        if self.lists.keys() & set(keys):
            for key in keys:
                self.lists.pop(key, None)
            self.plan = make_plan(self.names, self.params, self.lists)

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

    def adopt(self, old: ParameterState) -> None:
        """Copy what `old` knows of parameters of the same names.

        Where a parameter has grown (a head with more classes), the leading part keeps its state
        and the rest starts anew.
        """
        for key, entries in self.lists.items():
            known = old.view(key)
            for name, entry in zip(self.names, entries, strict=True):
                if name in known and known[name].dim() == entry.dim():
                    shapes = zip(entry.shape, known[name].shape, strict=True)
                    common = tuple(slice(min(new, before)) for new, before in shapes)
                    entry[common].copy_(known[name][common])
