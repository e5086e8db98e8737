"""Sums over samples of the squared, or absolute, gradient of each single sample."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.inputs import rows, split
from clext.core.parameters import allocate_state
from clext.importance.capture import Call, Capture, ends_of, stream_output_gradients
from clext.importance.coverage import Coverage, CoverageFinder
from clext.importance.fallback import SingleSamples, warn_slow
from clext.importance.passes import check_outputs, flat, single_outputs
from clext.importance.rule import add_joint_, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from clext.core.inputs import Inputs
    from clext.importance.coverage import Uses
    from clext.importance.passes import Forward

    # From the outputs of a batch, [samples, ...]: by each of these, of the same shape, the
    # outputs are weighted and summed, and that number is differentiated for each sample.
    Cotangents = Callable[[Tensor], Iterable[Tensor]]


class PerSampleSum:
    """Accumulates, for parameter i, sum over samples n and cotangents c of |d(c_n . f(x_n))/di|^p.

    p is 2, or 1 if `absolute`. Each parameter by the rules of the layers that use it where they
    hold, else by torch.func. `sums` has the parameters' order and layout, in the state dtype; 0
    for frozen parameters.
    """

    def __init__(
        self,
        owner: str,
        model: nn.Module,
        params: Sequence[Tensor],
        forward: Forward,
        *,
        absolute: bool,
    ) -> None:
        self._owner, self._model, self._params, self._forward = owner, model, params, forward
        self._function = torch.abs if absolute else torch.square
        self._capture = Capture(model, params, forward)
        self._finder = CoverageFinder(self._capture, params)
        self.sums = allocate_state(params)
        self._singles = SingleSamples(owner, model, params, forward, self.sums, self._function)

    def add(self, x: Inputs, cotangents: Cotangents) -> None:
        """Add the samples of one batch."""
        count = rows(x)
        outputs, calls = self._capture.forward(x)
        outputs = check_outputs(self._owner, outputs, count)
        weights = cotangents(outputs.detach())
        outputs = flat(outputs)
        coverage = Coverage()
        if outputs.requires_grad:
            coverage = self._finder.find(x, outputs, calls, count)
        if coverage.mixed:
            # With gradients, as the outputs were made: some layers calculate otherwise without.
            singles = [single_outputs(self._owner, self._forward, one) for one in split(x, 1)]
            weights = cotangents(torch.cat([entry.detach() for entry in singles]))
        if coverage.singly:
            warn_slow(self._model, self._params, coverage.singly)
        uses = coverage.uses(calls, count)
        batch = _Batch(self.sums, uses, self._function, frees_graph=count > 1)
        del calls, uses  # for `batch` to give their inputs back
        for weight, following in pairwise(chain(weights, [None])):  # the first refuses bad labels
            assert weight is not None
            weight = flat(weight)
            batch.add(outputs, weight, last=following is None)
            if coverage.singly:
                self._singles.add(x, weight.to(outputs.dtype), coverage.singly)
        batch.finish()


class _Batch:
    """Adds to `sums` what the rules cover, for the cotangents of one forward pass.

    `frees_graph`: with the last cotangent, what the forward pass had kept is given back. Not where
    there is one sample: all rows are taken for its own then, also those of something that the
    model keeps for the passes to come.
    """

    def __init__(
        self,
        sums: list[Tensor],
        uses: Uses,
        function: Callable[[Tensor], Tensor],
        *,
        frees_graph: bool,
    ) -> None:
        self._sums, self._function, self._frees_graph = sums, function, frees_graph
        # By call: the sums of its parameters that have no other use, of which some are `separable`:
        # they need no more of the cotangents than the sum of their function. `joint`: parameters of
        # several uses.
        self._single: dict[Call, dict[str, Tensor]] = {}
        self._separable: dict[Call, dict[str, Tensor]] = {}
        self._joint: dict[int, list[tuple[Call, str]]] = {}
        self._totals: dict[Call, Tensor] = {}
        for i, places in uses.items():
            call, name = places[0]
            if len(places) > 1:
                self._joint[i] = places
            else:
                kind = self._separable if call.separable else self._single
                kind.setdefault(call, {})[name] = sums[i]
        self._shared = {call for places in self._joint.values() for call, _ in places}
        self._calls = list(dict.fromkeys(c for places in uses.values() for c, _ in places))
        self._ends = ends_of(self._calls)

    def add(self, outputs: Tensor, cotangent: Tensor, *, last: bool) -> None:
        """Add one cotangent's gradients, or keep for `finish` what is needed of them."""
        rows: dict[Call, Tensor] = {}  # of calls with other uses of a parameter

        def receive(call: Call, g: Tensor) -> None:
            g = call.rows(g)
            if call in self._shared:
                rows[call] = g
            if call in self._separable:
                power = self._function(g)
                total = self._totals.get(call)
                self._totals[call] = power if total is None else total.add_(power)
            if call in self._single:
                for features, part in call.parts(g):
                    for name, acc in self._single[call].items():
                        call.rule.add_(acc, name, features, part, self._function)
            if last and call not in self._shared and call not in self._separable:
                call.release()

        keep_graph = not (last and self._frees_graph)
        stream_output_gradients(
            outputs, self._calls, self._ends, cotangent, receive, keep_graph=keep_graph
        )
        for i, places in self._joint.items():
            uses = [call.use(name, rows[call]) for call, name in places if call in rows]
            if uses:
                add_joint_(self._sums[i], uses, self._function)

    def finish(self) -> None:
        """Add the separable parameters: the inputs are the same for every cotangent."""
        for call, total in self._totals.items():
            powers = self._function(call.features())
            for name, acc in self._separable[call].items():
                call.rule.add_(acc, name, powers, total, identity)
