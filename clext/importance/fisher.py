"""Diagonal Fisher information, as in EWC (Kirkpatrick et al. 2017, arXiv:1612.00796)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.checks import choice, integer
from clext.core.inputs import rows
from clext.core.likelihood import GAUSSIAN, IGNORED
from clext.core.seeding import generator
from clext.core.supervision import Supervision
from clext.importance.batch_mean import BatchMeanSum
from clext.importance.passes import (
    averaged,
    evaluation,
    parameter_list,
)
from clext.importance.per_sample import PerSampleSum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.processes import Processes
    from clext.importance.kronecker import KroneckerSum
    from clext.importance.passes import Forward

FISHER_KINDS = ("empirical", "exact", "sample", "reversed", "batch")


def fisher_information(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    kind: str = "empirical",
    seed: int = 0,
    supervision: Supervision | None = None,
    samples: int | None = None,
    reduction: str = "mean",
) -> list[Tensor]:
    """The mean over samples of (d log p(y | x) / d parameter)^2.

    p is the likelihood that `supervision` says, by default the softmax of the outputs. A sample may
    be a sequence: log p is summed over its positions that count.

    Args:
        model: left as it was.
        params: parameters of `model`; frozen ones get 0.
        batches: iterable of batches; how samples are split into batches does not matter (but for
            "batch").
        kind: where y comes from. "empirical": the label of the data. "exact": the expectation over
            the model's own p, at the price of one backward pass per output. "sample": one draw from
            p. "reversed": the label of the data, by the softmax of the negated outputs, which does
            not vanish where the model is sure (EWC-DR: Liu and Chang 2026, arXiv:2603.18596).
            "batch": the label, but the square of each batch's mean gradient; cheap on any
            model and common, though its size then falls with the batch size.
        seed: of the draws for "sample".
        supervision: what of a batch goes into the model, and how labels follow from its outputs;
            None: batches (x, y) and classes y.
        samples: how many are measured, the first that `batches` gives; None: all.
        reduction: "mean" over samples, or their "sum".

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    choice("fisher_information", "kind", kind, FISHER_KINDS)
    choice("fisher_information", "reduction", reduction, ("mean", "sum"))
    seed = integer("fisher_information", "seed", seed, minimum=0)
    supervision = Supervision(model) if supervision is None else supervision
    check_kind("fisher_information", kind, supervision)
    owner = f"Fisher information ({kind})"
    params = parameter_list(owner, model, params)
    processes = supervision.processes  # which the model does not show inside
    with evaluation(model, params, seed) as held:
        kind_of_sum = BatchMeanSum if kind == "batch" else PerSampleSum
        forward = forward_of(supervision, kind)
        sums = kind_of_sum(owner, model, held, forward, absolute=False)
        data = supervision.read(
            owner, batches, held[0].device, samples=samples, processes=processes
        )
        count = add_data(sums, owner, kind, supervision, data, seed, processes)
        processes.sum_(sums.sums)
        return averaged(owner, sums.sums, count if reduction == "mean" else 1, params)


def forward_of(supervision: Supervision, kind: str) -> Forward:
    """From a batch to what is differentiated: the outputs, or losses of the user's own."""
    if not supervision.gives_losses:
        return supervision
    return supervision.own_losses if kind != "batch" else supervision.mean_losses


def add_data(
    sums: PerSampleSum | BatchMeanSum | KroneckerSum,
    owner: str,
    kind: str,
    supervision: Supervision,
    data: Iterable[tuple[Inputs, Tensor | None]],
    seed: int,
    processes: Processes,
) -> int:
    """Add every batch to the sums of this process; returns how many samples all of them have."""
    draws = generator(seed, processes.rank)
    count, any_counts = 0, False
    with processes.together():
        for x, y in data:
            sums.add(x, _score_functions(owner, kind, supervision, x, y, draws))
            count += rows(x)
            any_counts = any_counts or y is None or bool((y != IGNORED).any())
    counts = processes.gathered((count, any_counts))
    if not any(any_counts for _, any_counts in counts):
        raise ValueError(f"{owner}: all labels of the data are {IGNORED}, so that none counts")
    return sum(count for count, _ in counts)


def check_kind(owner: str, kind: str, supervision: Supervision) -> None:
    """ValueError where a kind needs outputs with a likelihood, and there are none such."""
    if kind == "reversed" and supervision.options["likelihood"] == GAUSSIAN:
        raise ValueError(
            f'{owner}: fisher="reversed" negates logits, and likelihood="{GAUSSIAN}" has none; '
            'take fisher="exact"'
        )
    if supervision.gives_losses and kind in ("exact", "sample", "reversed"):
        raise ValueError(
            f'{owner}: fisher="{kind}" takes the likelihood of the outputs, and loss= '
            'gives losses alone; take "empirical", or forward= and likelihood='
        )


def _score_functions(
    owner: str,
    kind: str,
    supervision: Supervision,
    x: Inputs,
    y: Tensor | None,
    draws: torch.Generator,
) -> Callable[[Tensor], Iterable[Tensor]]:
    """From outputs to the gradients of log p(labels) by them, one for each choice of labels."""

    def cotangents(outputs: Tensor) -> Iterator[Tensor]:
        if supervision.gives_losses:  # -log p themselves
            yield -torch.ones_like(outputs)
            return
        likelihood = supervision.likelihood
        by_class, labels = supervision.matched(owner, outputs, x, y)
        likelihood.check_values(owner, by_class, labels)
        if kind == "exact":
            yield from map(supervision.as_outputs, likelihood.weighted_scores(by_class, labels))
        elif kind == "sample":
            yield supervision.as_outputs(likelihood.drawn_score(by_class, labels, draws))
        elif kind == "reversed":
            yield supervision.as_outputs(-likelihood.score(-by_class, labels))
        else:
            yield supervision.as_outputs(likelihood.score(by_class, labels))

    return cotangents
