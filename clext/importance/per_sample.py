"""Sums over samples of the squared, or absolute, gradient of each single sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.parameters import allocate_state
from clext.importance.capture import Call, Capture, ends_of, stream_output_gradients
from clext.importance.fallback import SingleSamples, warn_slow
from clext.importance.passes import check_outputs, single_outputs
from clext.importance.rule import add_joint_, identity
from clext.importance.sample_gradients import NO_COVERAGE, Coverage, CoverageFinder, bind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from clext.importance.passes import Forward

    # From the outputs of a batch, [samples, outputs]: by each of these, of the same shape, the
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

    def add(self, x: Tensor, cotangents: Cotangents) -> None:
        """Add the samples of one batch."""
        outputs, calls = self._capture.forward(x)
        outputs = check_outputs(self._owner, outputs, len(x))
        weights = cotangents(outputs.detach())
        coverage = NO_COVERAGE
        if outputs.requires_grad:
            coverage = self._finder.find(x, outputs, calls, len(x))
        if coverage.mixed:
            # With gradients, as the outputs were made: some layers calculate otherwise without.
            singles = [single_outputs(self._owner, self._forward, sample) for sample in x.split(1)]
            weights = cotangents(torch.cat([entry.detach() for entry in singles]))
        if coverage.singly:
            warn_slow(self._model, self._params, coverage.singly)
        batch = _Batch(self.sums, calls, coverage, len(x), self._function)
        del calls  # for `batch` to give their inputs back
        for weight, last in _up_to_last(weights):  # the first one refuses bad labels
            batch.add(outputs, weight, last=last)
            if coverage.singly:
                self._singles.add(x, weight.to(outputs.dtype), coverage.singly)
        batch.finish()


class _Batch:
    """Adds to `sums` what the rules cover, for the cotangents of one forward pass."""

    def __init__(
        self,
        sums: list[Tensor],
        calls: Sequence[Call],
        coverage: Coverage,
        samples: int,
        function: Callable[[Tensor], Tensor],
    ) -> None:
        self._sums, self._function = sums, function
        self._calls = bind(calls, coverage, samples)
        # By call: the sums of its parameters that have no other use, of which some are `separable`:
        # they need no more of the cotangents than the sum of their function. `joint`: parameters of
        # several uses.
        self._single: dict[int, dict[str, Tensor]] = {}
        self._separable: dict[int, dict[str, Tensor]] = {}
        self._joint: dict[int, list[tuple[int, str]]] = {}
        self._totals: dict[int, Tensor] = {}
        for i, places in coverage.uses.items():
            c, name = places[0]
            if len(places) > 1:
                self._joint[i] = places
            else:
                kind = self._separable if self._calls[c].separable else self._single
                kind.setdefault(c, {})[name] = sums[i]
        self._shared = {c for places in self._joint.values() for c, _ in places}
        self._ends = ends_of([entry.call for entry in self._calls.values()])
        # Where there is one sample, all rows are taken for its own: also those of something that
        # the model keeps for the passes to come.
        self._frees_graph = samples > 1

    def add(self, outputs: Tensor, cotangent: Tensor, *, last: bool) -> None:
        """Add one cotangent's gradients, or keep for `finish` what is needed of them.

        With the `last` one, what the forward pass had kept is given back, from the outputs on.
        """
        numbers = list(self._calls)
        rows: dict[int, Tensor] = {}  # of calls with other uses of a parameter

        def receive(k: int, g: Tensor) -> None:
            c = numbers[k]
            call = self._calls[c]
            g = call.rows(g)
            if c in self._shared:
                rows[c] = g
            if c in self._separable:
                power = self._function(g)
                self._totals[c] = self._totals[c].add_(power) if c in self._totals else power
            if c in self._single:
                for features, part in call.parts(g):
                    call.call.rule.add_(self._single[c], features, part, self._function)
            if last and c not in self._shared and c not in self._separable:
                call.call.release()

        calls = [entry.call for entry in self._calls.values()]
        keep_graph = not (last and self._frees_graph)
        stream_output_gradients(
            outputs, calls, self._ends, cotangent, receive, keep_graph=keep_graph
        )
        for i, places in self._joint.items():
            uses = [self._calls[c].use(name, rows[c]) for c, name in places if c in rows]
            if uses:
                add_joint_(self._sums[i], uses, self._function)
            for c, _ in places:
                self._calls[c].release()

    def finish(self) -> None:
        """Add the separable parameters: the inputs are the same for every cotangent."""
        for c, total in self._totals.items():
            call = self._calls[c]
            powers = self._function(call.features())
            call.call.rule.add_(self._separable[c], powers, total, identity)


def _up_to_last(entries: Iterable[Tensor]) -> Iterator[tuple[Tensor, bool]]:
    """Each entry, and whether it is the last."""
    before: Tensor | None = None
    for entry in entries:
        if before is not None:
            yield before, False
        before = entry
    if before is not None:
        yield before, True
