"""State of parameters of which some are pulled together, a layer by Kronecker factors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clext.core.parameters import canonical_names
from clext.importance import LayerFactors
from clext.methods.parts.state import ParameterState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# In state dicts: the fields of LayerFactors.
_KEYS = ("input_factor", "output_factor")


class FactoredState(ParameterState):
    """With factors of some layers, by the name of the weight: a row [tasks, ...] for each task.

    Where there are factors, importance is 0.
    """

    def __init__(self, *args: Any) -> None:  # noqa: ANN401
        super().__init__(*args)
        self.factors: dict[str, LayerFactors] = {}

    def add_factors(self, found: Mapping[str, LayerFactors]) -> None:
        """Those of one more task, [out, out] and [1 + in, 1 + in]."""
        for name, factors in found.items():
            new = [entry.unsqueeze(0) for entry in factors]
            known = self.factors.get(name)
            if known is not None:
                new = [torch.cat(pair) for pair in zip(known, new, strict=True)]
            self.factors[name] = LayerFactors(*new)

    def penalty(self, given: Mapping[str, Tensor] | None = None) -> Tensor:
        """As any state's, and the sum of D * (sum_k G_k D A_k) over the layers with factors."""
        value = super().penalty(given)
        for factors, change, _ in self._layers(given or {}):
            value = value + (change * _product(factors, change)).sum()
        return value

    def protects(self, parameter: Tensor) -> bool:
        """As any state's, and what has factors."""
        weights = (self.params[self.names.index(name)] for name in self.factors)
        return any(entry is parameter for entry in weights) or super().protects(parameter)

    @torch.no_grad()
    def add_penalty_grad_(self, strength: float) -> Tensor:
        """As any state's; 2 * strength * sum_k G_k D A_k for the layers with factors."""
        value = super().add_penalty_grad_(strength)
        for factors, change, parameters in self._layers({}):
            product = _product(factors, change)
            value = value + strength * (change * product).sum()
            for parameter, part in zip(parameters, (product[:, 0], product[:, 1:]), strict=True):
                if parameter is not None and _moves(parameter):
                    pull = (2 * strength * part).view(parameter.shape).to(parameter.dtype)
                    parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
        return value

    def _layers(
        self, given: Mapping[str, Tensor]
    ) -> Iterator[tuple[LayerFactors, Tensor, tuple[Tensor | None, Tensor]]]:
        """Of each layer that may move: factors, change D = [db, dW], and bias and weight."""
        params = dict(zip(self.names, self.params, strict=True))
        anchors = dict(zip(self.names, self.lists["anchor"], strict=True))
        for name, factors in self.factors.items():
            bias_name = name.removesuffix("weight") + "bias"
            weight, bias = params[name], params.get(bias_name)
            own = (name,) if bias is None else (name, bias_name)
            if not any(entry in given or _moves(params[entry]) for entry in own):
                continue
            change = (given.get(name, weight).to(anchors[name].dtype) - anchors[name]).flatten(1)
            first = change.new_zeros(len(change))
            if bias is not None:
                first = given.get(bias_name, bias).to(first.dtype) - anchors[bias_name]
            yield factors, torch.cat([first.unsqueeze(1), change], 1), (bias, weight)

    def adopt(self, old: ParameterState, owner: str) -> list[str]:
        """As any state's; of a layer that has grown factors keep their leading part."""
        lost = super().adopt(old, owner)
        assert isinstance(old, FactoredState)
        names = dict(zip(map(id, self.params), self.names, strict=True))
        before = dict(zip(old.names, old.lists["anchor"], strict=True))
        for name, factors in old.factors.items():
            now = names.get(id(old.params[old.names.index(name)]), name)
            if now not in self.names:
                continue
            like = self.lists["anchor"][self.names.index(now)]
            if like.shape[2:] != before[name].shape[2:]:
                raise ValueError(
                    f"{owner}: the kernel of '{now}' was {list(before[name].shape[2:])} and now is "
                    f"{list(like.shape[2:])}: its factors fit to channels that are added, not to "
                    "another kernel; give the new parameter another name"
                )
            pairs = zip(factors, self._sizes(now), strict=True)
            self.factors[now] = LayerFactors(*(_grown(*pair, like) for pair in pairs))
        return lost

    def _sizes(self, name: str) -> tuple[int, int]:
        """Of the two factors of a layer with this weight."""
        weight = self.params[self.names.index(name)]
        return 1 + weight[0].numel(), len(weight)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Copies of lists and factors, by parameter name."""
        both: dict[str, dict[str, Tensor]] = {key: {} for key in _KEYS}
        for name, factors in self.factors.items():
            for key, entry in zip(_KEYS, factors, strict=True):
                both[key][name] = entry.clone()
        return {**super().state_dict(), **both}

    def load_state_dict(self, given: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over such copies; ValueError for other parameters."""
        found = {key: canonical_names(given.get(key, {})) for key in _KEYS}
        inputs, outputs = (found[key] for key in _KEYS)
        factors = {}
        for name in inputs.keys() | outputs.keys():
            sizes = self._sizes(name) if name in self.names else ()
            pair = [part[name] for part in (inputs, outputs) if name in part]
            if [entry.shape[1:] for entry in pair] != [torch.Size((k, k)) for k in sizes]:
                raise ValueError(f"the factors of '{name}' are of another layer")
            own = self.lists["anchor"][self.names.index(name)]
            factors[name] = LayerFactors(*(entry.to(own, copy=True) for entry in pair))
        super().load_state_dict(given)
        self.factors = factors

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "factors": self.factors}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.factors = state["factors"]


def _grown(factors: Tensor, size: int, like: Tensor) -> Tensor:
    """The same of a larger layer: what is new counts for nothing."""
    new = size - factors.shape[1]
    return F.pad(factors, (0, new, 0, new)).to(like)


def _moves(parameter: Tensor) -> bool:
    """Not where it is frozen, and has no gradient."""
    return parameter.requires_grad or parameter.grad is not None


def _product(factors: LayerFactors, change: Tensor) -> Tensor:
    """sum_k G_k D A_k, [out, 1 + in], by two products of matrices."""
    tasks, out = factors.outputs.shape[:2]
    left: Tensor = factors.outputs.flatten(0, 1) @ change
    left = left.unflatten(0, (tasks, out)).transpose(0, 1).flatten(1)
    return left @ factors.inputs.flatten(0, 1)
