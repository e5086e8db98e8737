"""Sums over samples of the squared, or absolute, gradient of each single sample."""

from __future__ import annotations

from itertools import chain, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.inputs import mapped, rows, split
from clext.core.parameters import allocate_state
from clext.importance.capture import Capture, ends_of, stream_output_gradients
from clext.importance.coverage import Coverage, CoverageFinder
from clext.importance.fallback import SingleSamples, warn_slow
from clext.importance.passes import check_finite, flat, gradients, single_outputs
from clext.importance.rule import add_uses_, identity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from clext.core.inputs import Inputs
    from clext.importance.call import Call, Path, Piece
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
        self._sums = allocate_state(params)
        # Sums for a part of a parameter, or in another layout: by its number and what part it is.
        self._parts: dict[object, tuple[int, Path, Tensor]] = {}
        self._singles = SingleSamples(owner, model, params, forward, self._sums, self._function)

    @property
    def sums(self) -> list[Tensor]:
        """What was added so far."""
        self._put_together(self._parts.keys())
        return self._sums

    def add(self, x: Inputs, cotangents: Cotangents) -> None:
        """Add the samples of one batch."""
        count = rows(x)
        if count == 1:
            self._add_one(x, cotangents)
            return
        outputs, calls = self._capture.forward(x)
        outputs = check_finite(self._owner, outputs)
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
        singly, uses = coverage.singly, coverage.uses()
        used = {(i, piece.path.key) for i, pieces in uses.items() for piece in pieces}
        self._put_together(self._parts.keys() - used)  # of other lengths, say
        batch = _Batch(uses, self._room, self._function)
        del calls, coverage, uses  # for `batch` to give their inputs back
        for weight, following in pairwise(chain(weights, [None])):  # the first refuses bad labels
            assert weight is not None
            weight = flat(weight)
            batch.add(outputs, weight, last=following is None)
            if singly:
                self._singles.add(x, weight.to(outputs.dtype), singly)
        batch.finish()

    def _add_one(self, x: Inputs, cotangents: Cotangents) -> None:
        """Add one sample, whose gradient is autograd's."""
        outputs = self._forward(mapped(Tensor.clone, x))
        outputs = check_finite(self._owner, outputs)
        for weight in cotangents(outputs.detach()):
            for i, gradient in gradients(outputs, self._params, weight).items():
                self._sums[i].add_(self._function(gradient.to(self._sums[i].dtype)))

    def _put_together(self, keys: Iterable[object]) -> None:
        """Add those of the parts to the sums of their parameters."""
        for key in list(keys):
            i, path, part = self._parts.pop(key)
            self._sums[i].add_(path.back(part))

    def _room(self, i: int, piece: Piece) -> Tensor:
        """Where `piece` of parameter i is summed up."""
        key = (i, piece.path.key)
        if key in self._parts:
            return self._parts[key][2]
        room = piece.room(self._sums[i])
        if room is None:
            return self._sums[i]
        self._parts[key] = (i, piece.path, room)
        return room


class _Batch:
    """Adds what the rules cover, for the cotangents of one forward pass.

    `room`: where what is added of a piece of a parameter goes. With the last cotangent, what the
    forward pass had kept is given back.
    """

    def __init__(
        self,
        uses: Uses,
        room: Callable[[int, Piece], Tensor],
        function: Callable[[Tensor], Tensor],
    ) -> None:
        self._function = function
        # By call: the sums of its parameters that have no other use, of which some are `separable`:
        # they need no more of the cotangents than the sum of their function. `joint`: pieces of
        # several uses, or such as have to wait for the end of the backward pass.
        self._single: dict[Call, dict[str, Tensor]] = {}
        self._separable: dict[Call, dict[str, Tensor]] = {}
        self._joint: list[tuple[Piece, Tensor]] = []
        self._totals: dict[Call, Tensor] = {}
        calls: dict[Call, None] = {}
        for i, pieces in uses.items():
            for piece in pieces:
                acc = room(i, piece)
                call, name = piece.uses[0]
                if len(piece.uses) > 1 or call.rule.asks_nodes:
                    self._joint.append((piece, acc))
                else:
                    kind = self._separable if call.separable else self._single
                    kind.setdefault(call, {})[name] = acc
                calls.update(dict.fromkeys(call for call, _ in piece.uses))
        self._shared = {call for piece, _ in self._joint for call, _ in piece.uses}
        self._calls = list(calls)
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

        stream_output_gradients(
            outputs, self._calls, self._ends, cotangent, receive, keep_graph=not last
        )
        for piece, acc in self._joint:
            uses = [call.use(name, rows[call]) for call, name in piece.uses if call in rows]
            if uses:
                add_uses_(acc, uses, self._function)

    def finish(self) -> None:
        """Add the separable parameters: the inputs are the same for every cotangent."""
        for call, total in self._totals.items():
            powers = self._function(call.features())
            for name, acc in self._separable[call].items():
                call.rule.add_(acc, name, powers, total, identity)
