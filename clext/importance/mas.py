"""Memory Aware Synapses: importance without labels (Aljundi et al. 2018, arXiv:1711.09601)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from clext.core.batches import read_inputs
from clext.core.checks import choice
from clext.importance.batch_mean import BatchMeanSum
from clext.importance.passes import averaged, evaluation, parameter_list
from clext.importance.per_sample import PerSampleSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.core.batches import Batches
    from clext.importance.passes import Forward

MAS_ESTIMATORS = ("per_sample", "batch")


def output_sensitivity(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    estimator: str = "per_sample",
    forward: Forward | None = None,
) -> list[Tensor]:
    """The mean over samples of |d ||f(x)||^2 / d parameter|, f the outputs of the model.

    Args:
        model: maps a batch of inputs to outputs [samples, outputs]; left as it was.
        params: parameters of `model`; frozen ones get 0.
        batches: iterable of x, (x,) or (x, y); y is not looked at.
        estimator: "per_sample", or "batch" for the absolute value of each batch's mean gradient
            (the same for a batch of one sample, smaller for larger ones).
        forward: what gives the outputs for a batch of inputs, by calling `model`; None: `model`.

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    choice("output_sensitivity", "estimator", estimator, MAS_ESTIMATORS)
    owner = f"MAS importance ({estimator})"
    kind_of_sum = BatchMeanSum if estimator == "batch" else PerSampleSum
    samples = 0
    params = parameter_list(owner, model, params)
    with evaluation(model, params, seed=0):
        sums = kind_of_sum(
            owner, model, params, model if forward is None else forward, absolute=True
        )
        for x in read_inputs(owner, batches, params[0].device):
            sums.add(x, lambda outputs: [2 * outputs])
            samples += len(x)
        return averaged(owner, sums.sums, samples)
