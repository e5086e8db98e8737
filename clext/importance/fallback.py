"""Gradients of single samples by torch.func, for what no layer rule covers."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clext.core.inputs import flatten, split, taken
from clext.core.lists import state_dtype
from clext.core.modes import call_with
from clext.importance.passes import flat, gradients, single_outputs
from clext.importance.rule import identity

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from clext.core.inputs import Inputs
    from clext.importance.passes import Forward
    from clext.importance.rule import Function

# Bound on the per-sample gradients held at once.
_CHUNK_BYTES = 256 * 2**20

# How far torch.func may be from autograd's gradients, relative to their largest entry.
_AGREEMENT = {torch.float64: 1e-8, torch.float32: 2e-3}
_LOW_PRECISION_AGREEMENT = 0.1

_NAMED = 3  # of the parameters in the warning

_warned: WeakSet[nn.Module] = WeakSet()


class SlowImportanceWarning(UserWarning):
    """The model has parameters without a fast rule: its samples are differentiated singly."""


class SingleSamples:
    """Adds function(gradient of one sample) to `sums`, sample by sample.

    By torch.func over chunks of samples; where it cannot batch a layer, in a plain loop.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        params: Sequence[Tensor],
        forward: Forward,
        sums: Sequence[Tensor],
        function: Function,
    ) -> None:
        self._owner, self._params, self._forward = owner, params, forward
        self._sums, self._function = sums, function
        self._model = model
        self._use_vmap = True
        self._agreed: set[object] = set()

    def add(self, x: Inputs, cotangent: Tensor, chosen: Iterable[int]) -> None:
        """Add the samples of one batch to the sums of the parameters `chosen`.

        `cotangent`: of outputs [samples, outputs].
        """
        chosen = sorted(chosen)
        kind = (tuple(chosen), *(entry.shape[1:] for entry in flatten(x)[0]))
        if self._use_vmap:
            try:
                if kind not in self._agreed:
                    self._use_vmap = self._agrees(x, cotangent, chosen)
                    self._agreed.add(kind)
                if self._use_vmap:
                    found = self._by_vmap(x, cotangent, chosen, self._function)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):
                # A layer that vmap cannot batch. If the model itself is at fault, the plain loop
                # will say so in its own words.
                self._use_vmap = False
        if not self._use_vmap:
            found = self._by_loop(x, cotangent, chosen, self._function)
        for i, entry in zip(chosen, found, strict=True):
            self._sums[i].add_(entry)

    def _agrees(self, x: Inputs, cotangent: Tensor, chosen: list[int]) -> bool:
        """Whether torch.func finds autograd's gradients, for the first and the last sample.

        It puts other tensors in the parameters' place, which does not reach what the model holds
        of them elsewhere, nor hooks on them.
        """
        x = taken(x, torch.tensor([0, -1], device=cotangent.device))
        draws = torch.Generator().manual_seed(0)
        weights = torch.randn(2, cotangent.shape[1], generator=draws).to(cotangent)
        expected = self._by_loop(x, weights, chosen, identity)
        found = self._by_vmap(x, weights, chosen, identity)
        dtype = self._params[chosen[0]].dtype
        tolerance = _AGREEMENT.get(dtype, _LOW_PRECISION_AGREEMENT)
        sizes = [float(entry.abs().max()) if entry.numel() else 0.0 for entry in expected]
        rounding = 16 * torch.finfo(dtype).eps * max(sizes)  # of gradients that cancel
        return all(
            bool(((mine - theirs).abs() <= tolerance * size + rounding).all())
            for mine, theirs, size in zip(found, expected, sizes, strict=True)
        )

    def _by_vmap(
        self, x: Inputs, cotangent: Tensor, chosen: list[int], function: Function
    ) -> list[Tensor]:
        """The sums over samples of function(gradient) by the parameters `chosen`."""
        index = {id(self._params[i]): k for k, i in enumerate(chosen)}
        named = {name: entry.detach() for name, entry in self._model.named_parameters()}
        places = {n: index[id(p)] for n, p in self._model.named_parameters() if id(p) in index}
        values = {name: named.pop(name) for name in places}
        named.update((name, entry.detach()) for name, entry in self._model.named_buffers())
        tensors, rebuild = flatten(x)

        def weighted_output(
            values: dict[str, Tensor], cotangent: Tensor, *sample: Tensor
        ) -> Tensor:
            x = rebuild([entry.unsqueeze(0).clone() for entry in sample])
            outputs = call_with(self._model, {**values, **named}, self._forward, x)
            return (outputs.reshape(-1) * cotangent).sum()

        gradients_of = torch.vmap(
            torch.func.grad(weighted_output),
            in_dims=(None, 0, *(0 for _ in tensors)),
            randomness="different",
        )
        sums = [torch.zeros_like(self._sums[i]) for i in chosen]
        sample_bytes = sum(entry.numel() * entry.element_size() for entry in values.values())
        size = max(1, _CHUNK_BYTES // max(1, sample_bytes))
        for parts in zip(*(entry.split(size) for entry in (cotangent, *tensors)), strict=True):
            with sdpa_kernel(SDPBackend.MATH):  # the kind of attention that vmap can batch
                found = gradients_of(values, *parts)
            for name, gradient in found.items():
                wide = gradient.detach().to(state_dtype(gradient.dtype))
                sums[places[name]].add_(function(wide).sum(0))
        return sums

    def _by_loop(
        self, x: Inputs, cotangent: Tensor, chosen: list[int], function: Function
    ) -> list[Tensor]:
        """As `_by_vmap`."""
        params = [self._params[i] for i in chosen]
        sums = [torch.zeros_like(self._sums[i]) for i in chosen]
        for sample, weights in zip(split(x, 1), cotangent.split(1), strict=True):
            outputs = flat(single_outputs(self._owner, self._forward, sample))
            for k, gradient in gradients(outputs, params, weights).items():
                sums[k].add_(function(gradient.to(sums[k].dtype)))
        return sums


def warn_slow(model: nn.Module, params: Sequence[Tensor], chosen: Iterable[int]) -> None:
    """Say once for each model which of its parameters are slow."""
    if model in _warned:
        return
    _warned.add(model)
    slow = {id(params[i]) for i in chosen}
    found = [name for name, entry in model.named_parameters() if id(entry) in slow]
    names = [
        f"'{name}' ({type(model.get_submodule(name.rpartition('.')[0])).__name__})"
        for name in found[:_NAMED]
    ]
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    warnings.warn(
        f"clext: importance of {type(model).__name__} is computed one sample at a time by "
        f"torch.func, which is slow, for {', '.join(names)}{more}: the layer has no fast rule, or "
        "uses the parameter outside of its own call, or mixes the samples of a batch (the option "
        "\"batch\" of EWC's fisher and MAS's estimator is fast for any model, but not per sample)",
        SlowImportanceWarning,
        stacklevel=2,
    )
