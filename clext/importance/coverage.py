"""Coverage of a pass by the layer rules: of which parameters they give the samples' gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core.inputs import taken
from clext.core.lists import state_dtype
from clext.importance.capture import Call, output_gradients
from clext.importance.layout import Layout, may_reorder, possible_layouts
from clext.importance.passes import flat
from clext.importance.rule import identity

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.core.inputs import Inputs
    from clext.importance.capture import Capture

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

# All groups of samples but one are probed, by a backward pass each. Of two samples that changed
# places, that shows the one whose group is probed, unless the other is in the same.
_PROBED_GROUPS = 3

_FEW = 16  # samples whose features are copied at once


# Of each parameter that the rules cover: its calls, and names in them.
Uses = dict[int, list[tuple[Call, str]]]


@dataclass(frozen=True)
class Coverage:
    """What the rules cover of a pass.

    `layouts`: of each call, None if its rows do not belong to samples. `covered`: the parameters
    whose gradients the rules give. `singly`: those that need torch.func. `mixed`: the samples of a
    batch even change each other's outputs.
    """

    layouts: Sequence[Layout | None] = ()
    covered: frozenset[int] = frozenset()
    singly: frozenset[int] = frozenset()
    mixed: bool = False

    def uses(self, calls: Sequence[Call], samples: int) -> Uses:
        """The uses of the parameters covered; from now on their calls tell rows by sample."""
        found: Uses = {}
        for call, layout in zip(calls, self.layouts, strict=False):
            if layout is not None:
                call.layout, call.samples = layout, samples
                for name, i in call.places.items():
                    if i in self.covered:
                        found.setdefault(i, []).append((call, name))
        return found


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

    def find(self, x: Inputs, outputs: Tensor, calls: Sequence[Call], samples: int) -> Coverage:
        """The coverage of the pass of `x` that made `outputs` [rows, outputs] and `calls`.

        Its rows are told apart by `samples`: all, or 1 to take all of them as one sample's.
        """
        # Of one sample there is no layout that the data could change.
        sizes = [call.leading for call in calls] if samples > 1 else []
        kind = (samples, len(outputs), *(call.rule for call in calls), *sizes)
        reorders = samples > 1 and may_reorder(outputs, samples)
        if kind in self._known and not reorders:
            return self._known[kind]
        if mixes(self._capture, x, outputs):
            found, lasting = Coverage(singly=frozenset(self._trainable), mixed=True), True
        else:
            found, lasting = self._probe(outputs, calls, samples)
        if lasting and not reorders:
            self._known[kind] = found
        return found

    def _probe(self, outputs: Tensor, calls: Sequence[Call], samples: int) -> tuple[Coverage, bool]:
        """The coverage, and whether all passes of this kind have it."""
        draws = torch.Generator().manual_seed(0)  # a gradient must not vanish by chance
        weights = torch.randn(outputs.shape, generator=draws).to(outputs)
        layouts, lasting = _find_layouts(outputs, weights, calls, samples)
        singly = set(self._capture.without_rule)
        for call, layout in zip(calls, layouts, strict=True):
            singly.update(call.places.values() if layout is None else ())
        covered = set(self._trainable) - singly
        uses = Coverage(layouts, frozenset(covered)).uses(calls, samples)
        params = [self._params[i] for i in self._trainable]
        by_output, by_parameter = output_gradients(outputs, calls, weights, params)
        arrived = dict(zip(calls, by_output, strict=True))
        for i, gradient in zip(self._trainable, by_parameter, strict=True):
            if i in singly:
                continue
            if gradient is None:
                # The layer was called with another tensor in its place, or to no avail.
                lasting = lasting and i not in uses
                covered.remove(i)
                continue
            gradient = gradient.to_dense()
            lasting = lasting and bool(gradient.any())
            if not _explain(gradient, [(c, name, arrived[c]) for c, name in uses.get(i, [])]):
                singly.add(i)
        return Coverage(layouts, frozenset(covered - singly), frozenset(singly)), lasting


def _find_layouts(
    outputs: Tensor, weights: Tensor, calls: Sequence[Call], samples: int
) -> tuple[list[Layout | None], bool]:
    """The layout of each call's rows, None where there is none, and whether other data has it too.

    Where only some samples' outputs are differentiated, by `weights`, the rows of all others have
    no gradient: not even one of rounding.
    """
    possible = [possible_layouts(call.leading, samples) for call in calls]
    draws = torch.Generator().manual_seed(0)
    group = torch.randperm(samples, generator=draws).to(outputs.device) % _PROBED_GROUPS
    for k in range(_PROBED_GROUPS - 1) if samples > 1 else ():
        found, _ = output_gradients(outputs, calls, weights * (group == k).unsqueeze(1))
        for c, (call, g) in enumerate(zip(calls, found, strict=True)):
            if g is not None:
                dims = call.row_dims[1]
                possible[c] = [
                    layout
                    for layout in possible[c]
                    if not bool(layout.rows(g, dims, samples)[group != k].any())
                ]
    # What is zero fits everything, and so does an arrangement that two layouts describe. Of several
    # rows of a sample in one dimension, the data may say which they are.
    lasting = samples == 1 or all(
        len(layouts) <= 1 and all(call.leading[layout.dim] == samples for layout in layouts)
        for call, layouts in zip(calls, possible, strict=True)
    )
    return [layouts[0] if layouts else None for layouts in possible], lasting


def _explain(gradient: Tensor, places: Sequence[tuple[Call, str, Tensor | None]]) -> bool:
    """Whether the rules' gradient is autograd's."""
    if gradient.numel() == 0:
        return True
    tolerance = _TOLERANCE.get(gradient.dtype, _LOW_PRECISION_TOLERANCE)
    if gradient.is_cuda and gradient.dtype == torch.float32:
        tolerance = _TF32_TOLERANCE
    total = _gradient(gradient, places)
    difference = (total - gradient).abs_()

    def is_small_beside(size: Tensor) -> bool:
        allowed = size.clamp_(min=_FLOOR * size.max()).mul_(tolerance)
        return bool((difference <= allowed).all())

    # The terms of a sum are together at least as large as the sum: mostly that is enough.
    return is_small_beside(total.abs_()) or is_small_beside(
        _gradient(gradient, places, of_absolute_terms=True)
    )


def _gradient(
    like: Tensor,
    places: Sequence[tuple[Call, str, Tensor | None]],
    *,
    of_absolute_terms: bool = False,
) -> Tensor:
    """The gradient by the rules."""
    total = torch.zeros_like(like, dtype=state_dtype(like.dtype))
    for call, name, g in places:
        if g is None:
            continue
        rule, name, features, rows = call.use(name, call.rows(g))
        if not of_absolute_terms:
            rule.add_(total, name, features, rows, identity)
            continue
        for some, few in zip(features.split(_FEW), rows.split(_FEW), strict=True):
            rule.add_(total, name, some.abs(), few.abs(), identity)  # features may be views of less
    return total


def mixes(capture: Capture, x: Inputs, outputs: Tensor) -> bool:
    """Whether samples change each other's outputs: a few in another order are compared with all.

    `outputs` are those of `x`. All passes have gradients: some layers calculate otherwise without.
    """
    whole, count = outputs.detach(), len(outputs)
    if count == 1:
        return False
    # Relative to how much samples differ: what all have in common tells nothing.
    spread = (whole - whole.mean(0)).abs().max()
    tolerance = _SAME_TOLERANCE.get(whole.dtype, _LOW_PRECISION_TOLERANCE)
    rounding = 16 * torch.finfo(whole.dtype).eps * whole.abs().max()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).to(whole.device)
    for group in order.chunk(_GROUPS):
        try:
            few, _ = capture.forward(taken(x, group))
        except torch.OutOfMemoryError:
            raise
        except Exception:  # a model for one size of batches
            few, _ = capture.forward(taken(x, group.repeat(count)[:count]))
            few = few[: len(group)]
        if not isinstance(few, Tensor) or flat(few).shape != whole[group].shape:
            return True
        if bool((flat(few).detach() - whole[group]).abs().max() > tolerance * spread + rounding):
            return True
    return False
