"""Sums over samples of the squared, or absolute, gradient of each single sample."""

from __future__ import annotations

import warnings
from itertools import chain
from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

from clext import ops
from clext.importance.evaluation import check_outputs, gradients
from clext.importance.linear import LayerPass, LinearRule
from clext.parameters import allocate_state
from clext.tensor_lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    # From the outputs of a batch, [samples, outputs]: by each of these, of the same shape, the
    # outputs are weighted and summed, and that number is differentiated for each sample.
    Cotangents = Callable[[Tensor], Iterable[Tensor]]

# Bound on the per-sample gradients held at once where torch.func computes them.
_CHUNK_BYTES = 256 * 2**20

_told: WeakSet[nn.Module] = WeakSet()


class SlowImportanceWarning(UserWarning):
    """The model has trainable layers without a fast rule: its samples are differentiated singly."""


class PerSampleSum:
    """Accumulates, for parameter i, sum over samples n and cotangents c of |d(c_n . f(x_n))/di|^p.

    p is 2, or 1 if `absolute`. By the rule for Linear layers where it holds, else by torch.func.
    `sums` has the parameters' order and layout, in the state dtype; 0 for frozen parameters.
    """

    def __init__(
        self, owner: str, model: nn.Module, params: Sequence[Tensor], *, absolute: bool
    ) -> None:
        self._owner, self._model, self._params = owner, model, params
        self._absolute = absolute
        self._rule = LinearRule.of(model, params)
        self._use_vmap = True
        self.sums = allocate_state(params)

    def add(self, x: Tensor, cotangents: Cotangents) -> None:
        """Add the samples of one batch."""
        if self._rule is not None:
            outputs, passes = self._rule.forward(x)
            outputs = check_outputs(self._owner, outputs, len(x))
            weights = iter(cotangents(outputs.detach()))
            first = next(weights)
            if passes and outputs.requires_grad and self._rule.verify(outputs, passes, first):
                self._add_by_rule(self._rule, outputs, passes, chain([first], weights))
                return
        _tell(self._model)
        with torch.no_grad():
            outputs = check_outputs(self._owner, self._model(x), len(x))
        for weight in cotangents(outputs):
            self._add_singly(x, weight.to(outputs.dtype))

    def _power(self, tensor: Tensor) -> Tensor:
        return tensor.abs() if self._absolute else tensor.square()

    def _add_by_rule(
        self,
        rule: LinearRule,
        outputs: Tensor,
        passes: list[LayerPass],
        cotangents: Iterable[Tensor],
    ) -> None:
        # The inputs are the same for every cotangent, so that one matrix product is enough.
        totals: list[Tensor] | None = None
        for cotangent in cotangents:
            powers = [self._power(g) for g in rule.output_gradients(outputs, passes, cotangent)]
            if totals is None:
                totals = powers
            else:
                for total, power in zip(totals, powers, strict=True):
                    total.add_(power)
        for entry, total in zip(passes, totals or [], strict=True):
            if "weight" in entry.places:
                inputs = self._power(entry.inputs.to(total.dtype))
                self.sums[entry.places["weight"]].addmm_(total.T, inputs)
            if "bias" in entry.places:
                self.sums[entry.places["bias"]].add_(total.sum(0))

    def _add_singly(self, x: Tensor, cotangent: Tensor) -> None:
        if self._use_vmap:
            try:
                self._add_by_vmap(x, cotangent)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):
                # A layer that vmap cannot batch. If the model itself is at fault, the plain loop
                # will say so in its own words.
                self._use_vmap = False
            else:
                return
        self._add_by_loop(x, cotangent)

    def _add_by_vmap(self, x: Tensor, cotangent: Tensor) -> None:
        index = {id(entry): i for i, entry in enumerate(self._params) if entry.requires_grad}
        places = {
            name: index[id(entry)]
            for name, entry in self._model.named_parameters()
            if id(entry) in index
        }
        values = {name: self._params[i].detach() for name, i in places.items()}

        def weighted_output(values: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
            outputs: Tensor = torch.func.functional_call(self._model, values, (x.unsqueeze(0),))
            return (outputs.squeeze(0) * cotangent).sum()

        gradients_of = torch.vmap(
            torch.func.grad(weighted_output), in_dims=(None, 0, 0), randomness="different"
        )
        sums = [torch.zeros_like(entry) for entry in self.sums]
        sample_bytes = sum(entry.numel() * entry.element_size() for entry in values.values())
        size = max(1, _CHUNK_BYTES // max(1, sample_bytes))
        for start in range(0, len(x), size):
            chunk = slice(start, start + size)
            for name, gradient in gradients_of(values, x[chunk], cotangent[chunk]).items():
                wide = gradient.to(state_dtype(gradient.dtype))
                sums[places[name]].add_(self._power(wide).sum(0))
        for total, entry in zip(self.sums, sums, strict=True):
            total.add_(entry)

    def _add_by_loop(self, x: Tensor, cotangent: Tensor) -> None:
        accumulate = ops.accumulate_abs_ if self._absolute else ops.accumulate_square_
        for n in range(len(x)):
            found = gradients(self._model(x[n : n + 1]), self._params, cotangent[n : n + 1])
            accumulate([self.sums[i] for i in found], list(found.values()), 1.0)


def _tell(model: nn.Module) -> None:
    if model not in _told:
        _told.add(model)
        warnings.warn(
            f"clext: importance of {type(model).__name__} is computed one sample at a time by "
            "torch.func, which is slow; the fast rule needs all trainable parameters in nn.Linear "
            "layers that are called once, with one row per sample",
            SlowImportanceWarning,
            stacklevel=2,
        )
