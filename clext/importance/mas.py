"""Memory Aware Synapses: importance without labels (Aljundi et al. 2018, arXiv:1711.09601)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from clext.core.checks import choice
from clext.core.inputs import rows
from clext.core.supervision import Supervision
from clext.importance.batch_mean import BatchMeanSum
from clext.importance.passes import averaged, evaluation, parameter_list
from clext.importance.per_sample import PerSampleSum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from clext.core.batches import Batches

MAS_ESTIMATORS = ("per_sample", "batch")


def output_sensitivity(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    estimator: str = "per_sample",
    supervision: Supervision | None = None,
    samples: int | None = None,
) -> list[Tensor]:
    """The mean over samples of |d ||f(x)||^2 / d parameter|, f the outputs of the model.

    Args:
        model: left as it was; its outputs are flattened to [samples, outputs].
        params: parameters of `model`; frozen ones get 0.
        batches: iterable of batches; labels are not looked at.
        estimator: "per_sample", or "batch" for the absolute value of each batch's mean gradient
            (the same for a batch of one sample, smaller for larger ones).
        supervision: what of a batch goes into the model, and how labels follow from its outputs;
            None: x, or (x, ...).
        samples: how many are measured, the first that `batches` gives; None: all.

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    choice("output_sensitivity", "estimator", estimator, MAS_ESTIMATORS)
    owner = f"MAS importance ({estimator})"
    kind_of_sum = BatchMeanSum if estimator == "batch" else PerSampleSum
    count = 0
    supervision = Supervision(model) if supervision is None else supervision
    params = parameter_list(owner, model, params)
    processes = supervision.processes
    with evaluation(model, params, seed=0) as held:
        sums = kind_of_sum(owner, model, held, supervision, absolute=True)
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
                sums.add(x, lambda outputs: [2 * outputs])
                count += rows(x)
        processes.sum_(sums.sums)
        return averaged(owner, sums.sums, sum(processes.gathered(count)), params)
