"""Gradients of single samples by torch.func, for what no layer rule explains."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clext.core.lists import state_dtype
from clext.importance.passes import gradients, single_outputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from clext.importance.rule import Function

    GradientsOf = Callable[[Tensor, Tensor], dict[str, Tensor]]

# Bound on the per-sample gradients held at once.
_CHUNK_BYTES = 256 * 2**20

# How far torch.func may be from autograd's gradient of a sample, relative to its largest entry.
_AGREEMENT = {torch.float64: 1e-8, torch.float32: 2e-3}
_LOW_PRECISION_AGREEMENT = 0.1
_SEED = 0

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
        self._agreed: set[object] = set()

    def add(self, x: Tensor, cotangent: Tensor, chosen: Iterable[int]) -> None:
        """Add the samples of one batch to the sums of the parameters `chosen`."""
        chosen = sorted(chosen)
        if self._use_vmap:
            try:
                kind = (tuple(chosen), x.shape[1:])
                if kind not in self._agreed:
                    self._use_vmap = self._agrees(x, cotangent, chosen)
                    self._agreed.add(kind)
                if self._use_vmap:
                    self._add_by_vmap(x, cotangent, chosen)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):
                # A layer that vmap cannot batch. If the model itself is at fault, the plain loop
                # will say so in its own words.
                self._use_vmap = False
        if not self._use_vmap:
            self._add_by_loop(x, cotangent, chosen)

    def _agrees(self, x: Tensor, cotangent: Tensor, chosen: list[int]) -> bool:
        """Whether torch.func finds autograd's gradients, for the first and the last sample.

        It puts other tensors in the parameters' place, which does not reach what the model holds
        of them elsewhere, nor hooks on them.
        """
        samples = torch.tensor([0, len(x) - 1], device=x.device)
        x = x[samples]
        draws = torch.Generator().manual_seed(_SEED)
        weights = torch.randn(cotangent[samples].shape, generator=draws).to(cotangent)
        params = [self._params[i] for i in chosen]
        expected = [
            gradients(single_outputs(self._model, x[n : n + 1]), params, weights[n : n + 1])
            for n in range(len(x))
        ]
        by_vmap, places = self._by_vmap(chosen)
        found = {places[name]: g.detach() for name, g in by_vmap(x, weights).items()}
        pairs = [
            (found[i][n] if i in found else zero, expected[n].get(k, zero))
            for k, i in enumerate(chosen)
            for zero in [torch.zeros_like(self._params[i]).detach()]
            for n in range(len(x))
        ]
        dtype = params[0].dtype
        largest = max(float(theirs.abs().max()) for _, theirs in pairs if theirs.numel())
        tolerance = _AGREEMENT.get(dtype, _LOW_PRECISION_AGREEMENT)
        rounding = 16 * torch.finfo(dtype).eps * largest  # of gradients that cancel
        return all(
            bool(((mine - theirs).abs() <= tolerance * theirs.abs().max() + rounding).all())
            for mine, theirs in pairs
            if theirs.numel()
        )

    def _by_vmap(self, chosen: list[int]) -> tuple[GradientsOf, dict[str, int]]:
        """A function from x and cotangent to gradients by name, and the names' indices."""
        index = {id(self._params[i]): i for i in chosen}
        named = dict(self._model.named_parameters())
        places = {name: index[id(entry)] for name, entry in named.items() if id(entry) in index}
        values = {name: self._params[i].detach() for name, i in places.items()}
        others = {name: entry.detach() for name, entry in named.items() if name not in places}

        def weighted_output(values: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
            outputs: Tensor = torch.func.functional_call(
                self._model, (values, others), (x.unsqueeze(0).clone(),)
            )
            return (outputs.squeeze(0) * cotangent).sum()

        gradients_of = torch.vmap(
            torch.func.grad(weighted_output), in_dims=(None, 0, 0), randomness="different"
        )

        def by_vmap(x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
            with sdpa_kernel(SDPBackend.MATH):  # the kind of attention that vmap can batch
                found: dict[str, Tensor] = gradients_of(values, x, cotangent)
            return found

        return by_vmap, places

    def _add_by_vmap(self, x: Tensor, cotangent: Tensor, chosen: list[int]) -> None:
        by_vmap, places = self._by_vmap(chosen)
        sums = {i: torch.zeros_like(self._sums[i]) for i in chosen}
        params = [self._params[i] for i in chosen]
        sample_bytes = sum(entry.numel() * entry.element_size() for entry in params)
        size = max(1, _CHUNK_BYTES // max(1, sample_bytes))
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            for name, gradient in by_vmap(x[chunk], cotangent[chunk]).items():
                wide = gradient.detach().to(state_dtype(gradient.dtype))
                sums[places[name]].add_(self._function(wide).sum(0))
        for i, entry in sums.items():  # all samples or none: the loop may have to start anew
            self._sums[i].add_(entry)

    def _add_by_loop(self, x: Tensor, cotangent: Tensor, chosen: list[int]) -> None:
        params = [self._params[i] for i in chosen]
        for n in range(len(x)):
            found = gradients(
                single_outputs(self._model, x[n : n + 1]), params, cotangent[n : n + 1]
            )
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
