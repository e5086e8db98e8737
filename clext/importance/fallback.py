"""Gradients of single samples by torch.func, for what no layer rule explains."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clext.importance.evaluation import gradients
from clext.tensor_lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clext.importance.layers import Function

# Bound on the per-sample gradients held at once.
_CHUNK_BYTES = 256 * 2**20

_NAMED = 3  # of the parameters in the warning

_told: WeakSet[nn.Module] = WeakSet()


class SlowImportanceWarning(UserWarning):
    """The model has parameters without a fast rule: its samples are differentiated singly."""


class SingleSamples:
    """Adds function(gradient of one sample) to `sums`, sample by sample.

    By torch.func over chunks of samples; where it cannot batch a layer, in a plain loop.
    """

    def __init__(
        self, model: nn.Module, params: Sequence[Tensor], sums: Sequence[Tensor], function: Function
    ) -> None:
        self._model, self._params, self._sums = model, params, sums
        self._function = function
        self._use_vmap = True

    def add(self, x: Tensor, cotangent: Tensor, chosen: Iterable[int]) -> None:
        """Add the samples of one batch to the sums of the parameters `chosen`."""
        chosen = sorted(chosen)
        if self._use_vmap:
            try:
                self._add_by_vmap(x, cotangent, chosen)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):
                # A layer that vmap cannot batch. If the model itself is at fault, the plain loop
                # will say so in its own words.
                self._use_vmap = False
            else:
                return
        self._add_by_loop(x, cotangent, chosen)

    def _add_by_vmap(self, x: Tensor, cotangent: Tensor, chosen: list[int]) -> None:
        index = {id(self._params[i]): i for i in chosen}
        named = dict(self._model.named_parameters())
        places = {name: index[id(entry)] for name, entry in named.items() if id(entry) in index}
        values = {name: self._params[i].detach() for name, i in places.items()}
        others = {name: entry.detach() for name, entry in named.items() if name not in places}

        def weighted_output(values: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
            outputs: Tensor = torch.func.functional_call(
                self._model, (values, others), (x.unsqueeze(0),)
            )
            return (outputs.squeeze(0) * cotangent).sum()

        gradients_of = torch.vmap(
            torch.func.grad(weighted_output), in_dims=(None, 0, 0), randomness="different"
        )
        sums = {i: torch.zeros_like(self._sums[i]) for i in chosen}
        sample_bytes = sum(entry.numel() * entry.element_size() for entry in values.values())
        size = max(1, _CHUNK_BYTES // max(1, sample_bytes))
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            with sdpa_kernel(SDPBackend.MATH):  # the kind of attention that vmap can batch
                found = gradients_of(values, x[chunk], cotangent[chunk])
            for name, gradient in found.items():
                wide = gradient.to(state_dtype(gradient.dtype))
                sums[places[name]].add_(self._function(wide).sum(0))
        for i, entry in sums.items():  # all samples or none: the loop may have to start anew
            self._sums[i].add_(entry)

    def _add_by_loop(self, x: Tensor, cotangent: Tensor, chosen: list[int]) -> None:
        params = [self._params[i] for i in chosen]
        for n in range(len(x)):
            found = gradients(self._model(x[n : n + 1]), params, cotangent[n : n + 1])
            for k, gradient in found.items():
                wide = gradient.to(state_dtype(gradient.dtype))
                self._sums[chosen[k]].add_(self._function(wide))


def tell(model: nn.Module, params: Sequence[Tensor], chosen: Iterable[int]) -> None:
    """Say once for each model which of its parameters are slow."""
    if model in _told:
        return
    _told.add(model)
    slow = {id(params[i]) for i in chosen}
    owners = {
        f"{prefix}.{name}".lstrip("."): type(module).__name__
        for prefix, module in model.named_modules()
        for name, entry in module.named_parameters(recurse=False)
        if id(entry) in slow
    }
    names = [f"'{name}' ({owner})" for name, owner in list(owners.items())[:_NAMED]]
    more = f" and {len(owners) - _NAMED} more" if len(owners) > _NAMED else ""
    warnings.warn(
        f"clext: importance of {type(model).__name__} is computed one sample at a time by "
        f"torch.func, which is slow, for {', '.join(names)}{more}: the layer has no fast rule, or "
        "uses the parameter outside of its own call, or mixes the samples of a batch (the option "
        "\"batch\" of EWC's fisher and MAS's estimator is fast for any model, but not per sample)",
        SlowImportanceWarning,
        stacklevel=2,
    )
