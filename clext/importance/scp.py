"""Sliced Cramer Preservation (Kolouri et al. 2020, ICLR): importance from the mean output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext import ops
from clext.core.checks import integer
from clext.core.inputs import split
from clext.core.parameters import allocate_rows, allocate_state
from clext.core.seeding import generator
from clext.core.supervision import Supervision
from clext.importance.capture import Capture, output_gradients
from clext.importance.coverage import CoverageFinder
from clext.importance.graph import Graph
from clext.importance.passes import (
    averaged,
    check_finite,
    evaluation,
    flat,
    parameter_list,
    single_outputs,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.core.batches import Batches
    from clext.importance.call import Call
    from clext.importance.coverage import Uses

# Bound on the derivatives by layers' outputs held at once.
_CHUNK_BYTES = 256 * 2**20


def sliced_cramer_importance(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    slices: int | str = "exact",
    seed: int = 0,
    supervision: Supervision | None = None,
    samples: int | None = None,
) -> list[Tensor]:
    """The mean over directions xi of (d (xi . f) / d parameter)^2, f the mean output on the data.

    The directions are uniform on the unit sphere. Needs the memory of the parameters
    min(outputs, slices) times.

    Args:
        model: left as it was; its outputs are flattened to [samples, outputs].
        params: parameters of `model`; frozen ones get 0.
        batches: iterable of batches; labels are not looked at.
        slices: number of directions drawn, or "exact" for the expectation over all of them (the
            mean square of the derivatives of the single outputs).
        seed: of the draws.
        supervision: what of a batch goes into the model, and how labels follow from its outputs;
            None: x, or (x, ...).
        samples: how many are measured, the first that `batches` gives; None: all.

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    if slices != "exact":
        slices = integer("sliced_cramer_importance", "slices", slices, minimum=1)
    seed = integer("sliced_cramer_importance", "seed", seed, minimum=0)
    owner = "SCP importance"
    count = 0
    supervision = Supervision(model) if supervision is None else supervision
    jacobian: _Jacobian | None = None
    params = parameter_list(owner, model, params)
    processes = supervision.processes
    with evaluation(model, params, seed) as held:
        capture = Capture(model, held, supervision, lambda rule: rule.gives_rows)
        finder = CoverageFinder(capture, held)
        data = supervision.read(
            owner,
            batches,
            held[0].device,
            samples=samples,
            labelled=False,
            processes=processes,
        )
        with processes.together():
            for x, _ in data:
                outputs, calls = capture.forward(x)
                outputs = flat(check_finite(owner, outputs))
                if jacobian is None:
                    jacobian = _Jacobian(held, outputs.shape[1], slices, seed)
                if outputs.requires_grad:
                    coverage = finder.find(x, outputs, calls, samples=1)
                    if coverage.mixed or Graph(outputs).scales_by_frequency:
                        # f is the mean of what each sample gives by itself.
                        for sample in split(x, 1):
                            jacobian.add(flat(single_outputs(owner, supervision, sample)), {})
                    else:
                        jacobian.add(outputs, coverage.uses())
                count += len(outputs)
        counts = processes.gathered((count, jacobian.outputs if jacobian else 0))
        if jacobian is None:  # of several processes one may have no share
            jacobian = _Jacobian(held, max(outputs for _, outputs in counts), slices, seed)
        processes.sum_(jacobian.rows)
        count = sum(count for count, _ in counts)
        return averaged(owner, jacobian.squares(), count**2, params)


class _Jacobian:
    """Derivatives of the outputs' sum over samples by the parameters, in a few rows.

    A row is a direction where fewer directions than outputs are drawn, else one output: from
    these, any number of directions can be put together at the end.
    """

    def __init__(
        self, params: Sequence[Tensor], outputs: int, slices: int | str, seed: int
    ) -> None:
        self._params, self.outputs = params, outputs
        draws, device = generator(seed), params[0].device
        # Weights of the rows, and the directions that remain to be put together from the rows.
        self._weights = torch.eye(outputs, device=device)
        self._directions: Tensor | None = None
        if not isinstance(slices, str):
            normal = torch.randn(slices, outputs, generator=draws)
            directions = (normal / normal.norm(dim=1, keepdim=True)).to(device)
            if slices < outputs:
                self._weights = directions
            else:
                self._directions = directions
        self.rows = [allocate_rows(entry, len(self._weights)) for entry in params]

    def add(self, outputs: Tensor, uses: Uses) -> None:
        """Add the samples of one batch.

        Where a rule can, the derivatives by a layer's outputs are taken alone, and turned into
        those by its parameters for many rows at once.
        """
        uses_of = {i: [use for piece in pieces for use in piece.uses] for i, pieces in uses.items()}
        calls = list(dict.fromkeys(call for places in uses_of.values() for call, _ in places))
        others = [i for i, p in enumerate(self._params) if p.requires_grad and i not in uses]
        row_bytes = sum(call.output_shape.numel() * 8 for call in calls)
        size = max(1, _CHUNK_BYTES // max(1, row_bytes))
        for start in range(0, len(self._weights), size):
            chunk = slice(start, start + size)
            by_output: dict[Call, list[Tensor]] = {}
            for k, weight in enumerate(self._weights[chunk].to(outputs.dtype), start):
                found, direct = output_gradients(
                    outputs, calls, weight.expand_as(outputs), [self._params[i] for i in others]
                )
                for i, gradient in zip(others, direct, strict=True):
                    if gradient is not None:
                        self.rows[i][k].add_(gradient.to_dense())
                for call, g in zip(calls, found, strict=True):
                    if g is not None:
                        by_output.setdefault(call, []).append(call.rows(g).squeeze(0))
            stacked = {call: torch.stack(rows) for call, rows in by_output.items()}
            for i, places in uses_of.items():
                for call, name in places:
                    if call in stacked:
                        features = call.features().squeeze(0)
                        call.rule.add_rows_(self.rows[i][chunk], name, features, stacked[call])

    def squares(self) -> list[Tensor]:
        """The mean over directions of the squared derivative along each."""
        sums = allocate_state(self._params)
        if self._directions is None:
            count = len(self._weights)
            for k in range(count):
                ops.accumulate_square_(sums, [rows[k] for rows in self.rows], 1.0 / count)
            return sums
        for dtype in {entry.dtype for entry in sums}:  # the op takes one at a time
            chosen = [i for i, entry in enumerate(sums) if entry.dtype == dtype]
            ops.sliced_importance_(
                [sums[i] for i in chosen],
                [self.rows[i] for i in chosen],
                self._directions.to(dtype),
                1.0 / len(self._directions),
            )
        return sums
