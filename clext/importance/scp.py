"""Sliced Cramer Preservation (Kolouri et al. 2020, ICLR): importance from the mean output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext import ops
from clext.importance.evaluation import averaged, check_outputs, evaluation, gradients, read_batches
from clext.options import integer
from clext.parameters import allocate_state
from clext.seeding import generator
from clext.tensor_lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.importance.evaluation import Batches


def sliced_cramer_importance(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    slices: int | str = "exact",
    seed: int = 0,
) -> list[Tensor]:
    """The mean over directions xi of (d (xi . f) / d parameter)^2, f the mean output on the data.

    The directions are uniform on the unit sphere. Needs the memory of the parameters
    min(outputs, slices) times.

    Args:
        model: maps a batch of inputs to outputs [samples, outputs]; left as it was.
        params: parameters of `model`; frozen ones get 0.
        batches: iterable of (x, y); y is not looked at.
        slices: number of directions drawn, or "exact" for the expectation over all of them (the
            mean square of the derivatives of the single outputs).
        seed: of the draws.

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    if slices != "exact":
        slices = integer("sliced_cramer_importance", "slices", slices, minimum=1)
    owner = "SCP importance"
    samples = 0
    jacobian: _Jacobian | None = None
    with evaluation(model, params, seed):
        for x, _ in read_batches(owner, batches, params[0].device):
            outputs = check_outputs(owner, model(x), len(x))
            if jacobian is None:
                jacobian = _Jacobian(params, outputs.shape[1], slices, seed)
            jacobian.add(outputs)
            samples += len(x)
        assert jacobian is not None  # read_batches gives at least one batch
        return averaged(owner, jacobian.squares(), samples**2)


class _Jacobian:
    """Derivatives of the outputs' sum over samples by the parameters, in a few rows.

    A row is a direction where fewer directions than outputs are drawn, else one output: from
    these, any number of directions can be put together at the end.
    """

    def __init__(
        self, params: Sequence[Tensor], outputs: int, slices: int | str, seed: int
    ) -> None:
        self._params = params
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
        self._rows = [_rows_like(entry, len(self._weights)) for entry in params]

    def add(self, outputs: Tensor) -> None:
        """Add the samples of one batch."""
        for k, weight in enumerate(self._weights.to(outputs.dtype)):
            for i, gradient in gradients(outputs, self._params, weight.expand_as(outputs)).items():
                self._rows[i][k].add_(gradient)

    def squares(self) -> list[Tensor]:
        """The mean over directions of the squared derivative along each."""
        sums = allocate_state(self._params)
        if self._directions is None:
            count = len(self._weights)
            for k in range(count):
                ops.accumulate_square_(sums, [rows[k] for rows in self._rows], 1.0 / count)
            return sums
        for dtype in {entry.dtype for entry in sums}:  # the op takes one at a time
            chosen = [i for i, entry in enumerate(sums) if entry.dtype == dtype]
            ops.sliced_importance_(
                [sums[i] for i in chosen],
                [self._rows[i] for i in chosen],
                self._directions.to(dtype),
                1.0 / len(self._directions),
            )
        return sums


def _rows_like(parameter: Tensor, count: int) -> Tensor:
    """Zeros [count, *parameter.shape], each row laid out like the parameter, in its state dtype."""
    size = parameter.numel()
    flat = torch.zeros(count * size, dtype=state_dtype(parameter.dtype), device=parameter.device)
    return flat.as_strided((count, *parameter.shape), (size, *parameter.stride()))
