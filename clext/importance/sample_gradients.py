"""Gradients of single samples by the layer rules: for which parameters of a pass they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core.lists import state_dtype
from clext.importance.capture import output_gradients
from clext.importance.layout import Layout, find_layouts, may_reorder
from clext.importance.rule import identity

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from clext.importance.capture import Call, Capture
    from clext.importance.rule import Use

# How far the rules' gradient may be from autograd's, relative to its own terms: above rounding
# (TF32 on GPUs, and some of the layers of torch add up in half precision), below what a hidden use
# changes.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}
_TF32_TOLERANCE = 2e-3
_LOW_PRECISION_TOLERANCE = 0.1
_FLOOR = 0.01  # Terms below this share of the largest are compared as if they had it.

# How far outputs of a smaller batch may be off, relative to how much those of samples differ: each
# layer may be rounded otherwise.
_SAME_TOLERANCE = {torch.float64: 1e-6, torch.float32: 0.02}
_GROUPS = 4  # in which the samples run once more

_FEW = 16  # samples whose features are copied at once


class BoundCall:
    """A call with the layout of its samples: its tensors as rows, see rule.py."""

    def __init__(self, call: Call, layout: Layout, samples: int) -> None:
        self.call = call
        self._layout, self._samples = layout, samples
        self._features: Tensor | None = None

    @property
    def separable(self) -> bool:
        """Whether a function of the gradient is the gradient of the functions."""
        return self.call.rule.separable(math.prod(self.call.leading) // self._samples)

    def features(self) -> Tensor:
        """What the output gradient is multiplied with, [samples, rows, ...]; see `release`."""
        if self._features is None:
            self._features = self.call.rule.features(self._inputs())
        return self._features

    def parts(self, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and output gradients, for as many samples at a time as the rule wants."""
        inputs = self._inputs()
        size = self.call.rule.samples_at_once(inputs)
        for start in range(0, self._samples, size):
            chunk = slice(start, start + size)
            yield self.call.rule.features(inputs[chunk]), g[chunk]

    def _inputs(self) -> Tensor:
        """The layer's input, [samples, rows, ...]."""
        rows = self._layout.rows(self.call.inputs, self.call.row_dims[0], self._samples)
        return rows.to(self.call.dtype) if rows.is_floating_point() else rows

    def release(self) -> None:
        """Give the memory of the features back: they can be as large as the input again."""
        self._features = None

    def rows(self, g: Tensor) -> Tensor:
        """The gradient by the call's output as [samples, rows, ...]."""
        return self._layout.rows(g, self.call.row_dims[1], self._samples)

    def use(self, name: str, rows: Tensor) -> Use:
        """The parameter `name` in this call, for the output gradient `rows`."""
        return self.call.rule, name, self.features(), rows


@dataclass(frozen=True)
class Coverage:
    """What the rules cover of a pass.

    `layouts`: of each call, None if its rows do not belong to samples. `uses`: of each parameter
    that the rules cover, its calls (by number) and names in them. `singly`: the parameters that
    they do not cover. `mixed`: the samples of a batch even change each other's outputs.
    """

    layouts: Sequence[Layout | None]
    uses: dict[int, list[tuple[int, str]]]
    singly: frozenset[int]
    mixed: bool = False


NO_COVERAGE = Coverage((), {}, frozenset())


def bind(calls: Sequence[Call], coverage: Coverage, samples: int) -> dict[int, BoundCall]:
    """By number, the calls that give some parameter its gradient, with their layouts."""
    needed = {c for places in coverage.uses.values() for c, _ in places}
    return {
        c: BoundCall(calls[c], layout, samples)
        for c, layout in enumerate(coverage.layouts)
        if layout is not None and c in needed
    }


class CoverageFinder:
    """Finds the coverage of each batch's pass, once for each kind of pass.

    Two passes are of one kind if they call the same layers in the same order with the same sizes.
    The first one is probed: its rows are matched to samples by which samples move them, and the
    gradient by the rules is compared with autograd's, so that uses of a parameter that no hook
    sees are noticed. Where the data may arrange the rows (a sample has several rows in one
    dimension, or rows are moved by an index), every pass is probed.
    """

    def __init__(self, capture: Capture, params: Sequence[Tensor]) -> None:
        self._capture, self._params = capture, params
        self._trainable = [i for i, entry in enumerate(params) if entry.requires_grad]
        self._known: dict[object, Coverage] = {}

    def find(self, x: Tensor, outputs: Tensor, calls: Sequence[Call], samples: int) -> Coverage:
        """The coverage of the pass of `x` that made `outputs` and `calls`.

        Its rows are told apart by `samples`: len(x), or 1 to take all of them as one sample's.
        """
        # Of one sample there is no layout that the data could change.
        sizes = [call.leading for call in calls] if samples > 1 else []
        kind = (samples, len(x), *(call.rule for call in calls), *sizes)
        reorders = samples > 1 and may_reorder(outputs, samples)
        if kind in self._known and not reorders:
            return self._known[kind]
        if mixes(self._capture, x, outputs):
            found, lasting = Coverage((), {}, frozenset(self._trainable), mixed=True), True
        else:
            found, lasting = self._probe(outputs, calls, samples)
        if lasting and not reorders:
            self._known[kind] = found
        return found

    def _probe(self, outputs: Tensor, calls: Sequence[Call], samples: int) -> tuple[Coverage, bool]:
        """The coverage, and whether all passes of this kind have it."""
        draws = torch.Generator().manual_seed(0)  # a gradient must not vanish by chance
        weights = torch.randn(outputs.shape, generator=draws).to(outputs)
        layouts, lasting = find_layouts(outputs, weights, calls, samples)
        singly = set(self._capture.without_rule)
        uses: dict[int, list[tuple[int, str]]] = {}
        for c, call in enumerate(calls):
            for name, i in call.places.items():
                uses.setdefault(i, []).append((c, name))
                if layouts[c] is None:
                    singly.add(i)
        params = [self._params[i] for i in self._trainable]
        by_output, by_parameter = output_gradients(outputs, calls, weights, params)
        bound = bind(calls, Coverage(layouts, uses, frozenset()), samples)
        for i, gradient in zip(self._trainable, by_parameter, strict=True):
            if i in singly:
                continue
            if gradient is None:
                # The layer was called with another tensor in its place, or to no avail.
                lasting = lasting and not uses.pop(i, [])
                continue
            gradient = gradient.to_dense()
            lasting = lasting and bool(gradient.any())
            places = [(bound[c], name, by_output[c]) for c, name in uses.get(i, [])]
            if not _explain(gradient, places):
                singly.add(i)
        uses = {i: places for i, places in uses.items() if i not in singly}
        return Coverage(layouts, uses, frozenset(singly)), lasting


def _explain(gradient: Tensor, places: Sequence[tuple[BoundCall, str, Tensor | None]]) -> bool:
    """Whether the rules' gradient is autograd's."""
    total = torch.zeros_like(gradient, dtype=state_dtype(gradient.dtype))
    _add_gradient(total, places, absolute=False)
    difference = (total - gradient).abs_()
    tolerance = _TOLERANCE.get(gradient.dtype, _LOW_PRECISION_TOLERANCE)
    if gradient.is_cuda and gradient.dtype == torch.float32:
        tolerance = _TF32_TOLERANCE
    # The terms of a sum are together at least as large as the sum: mostly that is enough.
    if _is_small(difference, total.abs_(), tolerance):
        return True
    _add_gradient(total.zero_(), places, absolute=True)
    return _is_small(difference, total, tolerance)


def _is_small(difference: Tensor, size: Tensor, tolerance: float) -> bool:
    """Whether each number is, beside what it is the rest of. Overwrites `size`."""
    if difference.numel() == 0:
        return True
    allowed = size.clamp_(min=_FLOOR * float(size.max())).mul_(tolerance)
    return bool((difference <= allowed).all())


def _add_gradient(
    total: Tensor, places: Sequence[tuple[BoundCall, str, Tensor | None]], *, absolute: bool
) -> None:
    """Add the gradient by the rules, or the sum of its absolute terms."""
    for call, name, g in places:
        if g is None:
            continue
        rule, name, features, rows = call.use(name, call.rows(g))
        size = _FEW if absolute else len(rows)  # features may be views of less
        for start in range(0, len(rows), size):
            few = slice(start, start + size)
            terms = (features[few].abs(), rows[few].abs()) if absolute else (features, rows)
            rule.add_({name: total}, *terms, identity)
        call.release()


def mixes(capture: Capture, x: Tensor, outputs: Tensor) -> bool:
    """Whether samples change each other's outputs: a few in another order are compared with all.

    `outputs` are those of `x`. All passes have gradients: some layers calculate otherwise without.
    """
    if len(x) == 1:
        return False
    whole = outputs.detach()
    # Relative to how much samples differ: what all have in common tells nothing.
    spread = (whole - whole.mean(0)).abs().max()
    tolerance = _SAME_TOLERANCE.get(whole.dtype, _LOW_PRECISION_TOLERANCE)
    rounding = 16 * torch.finfo(whole.dtype).eps * whole.abs().max()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device)
    for group in order.chunk(_GROUPS):
        try:
            few, _ = capture.forward(x[group])
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model for one size of batches
            few, _ = capture.forward(x[group.repeat(len(x))[: len(x)]])
            few = few[: len(group)]
        if not isinstance(few, Tensor) or few.shape != whole[group].shape:
            return True
        if bool((few.detach() - whole[group]).abs().max() > tolerance * spread + rounding):
            return True
    return False
