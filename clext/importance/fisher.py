"""Diagonal Fisher information, as in EWC (Kirkpatrick et al. 2017, arXiv:1612.00796)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.batches import class_labels, read_batches
from clext.core.checks import choice, integer
from clext.core.lists import state_dtype
from clext.core.seeding import generator
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
    from clext.importance.passes import Forward

FISHER_KINDS = ("empirical", "exact", "sample", "batch")


def fisher_information(
    model: nn.Module,
    params: Sequence[Tensor],
    batches: Batches | None,
    *,
    kind: str = "empirical",
    seed: int = 0,
    forward: Forward | None = None,
) -> list[Tensor]:
    """The mean over samples of (d log p(y | x) / d parameter)^2, p the softmax of the outputs.

    Args:
        model: maps a batch of inputs to logits [samples, classes]; left as it was.
        params: parameters of `model`; frozen ones get 0.
        batches: iterable of (x, y), y integer classes [samples]; how samples are split into
            batches does not matter (but for "batch").
        kind: where y comes from. "empirical": the label of the data. "exact": the expectation over
            the model's own p, at the price of one backward pass per class. "sample": one draw from
            p. "batch": the label, but the square of each batch's mean gradient; cheap on any
            model and common, though its size then falls with the batch size.
        seed: of the draws for "sample".
        forward: what gives the logits for a batch of inputs, by calling `model`; None: `model`.

    Returns:
        One tensor per parameter, with its shape and strides, in its state dtype.

    Raises:
        ValueError: the data or the outputs are not as described, or not finite.
    """
    choice("fisher_information", "kind", kind, FISHER_KINDS)
    seed = integer("fisher_information", "seed", seed, minimum=0)
    owner = f"Fisher information ({kind})"
    params = parameter_list(owner, model, params)
    with evaluation(model, params, seed):
        kind_of_sum = BatchMeanSum if kind == "batch" else PerSampleSum
        sums = kind_of_sum(
            owner, model, params, model if forward is None else forward, absolute=False
        )
        draws = generator(seed)
        samples = 0
        for x, y in read_batches(owner, batches, params[0].device):
            sums.add(x, _score_functions(owner, kind, y, draws))
            samples += len(x)
        return averaged(owner, sums.sums, samples)


def _score_functions(
    owner: str, kind: str, y: Tensor, draws: torch.Generator
) -> Callable[[Tensor], Iterable[Tensor]]:
    """From logits to the gradients of log p(label) by the logits, one for each label counted."""

    def cotangents(logits: Tensor) -> Iterator[Tensor]:
        probabilities = _softmax(logits)
        if kind == "exact":
            for label in range(logits.shape[1]):
                # Squared later, so that the label counts with its probability.
                weight = probabilities[:, label : label + 1].sqrt()
                labels = torch.full((len(logits),), label, device=logits.device)
                yield weight * _score(probabilities, labels)
        elif kind == "sample":
            yield _score(probabilities, _draw(probabilities, draws))
        else:
            yield _score(probabilities, class_labels(owner, y, len(logits), range(logits.shape[1])))

    return cotangents


def _softmax(logits: Tensor) -> Tensor:
    return logits.to(state_dtype(logits.dtype)).softmax(dim=1)


def _score(probabilities: Tensor, labels: Tensor) -> Tensor:
    """D log p(label) / d logits: one at the label, minus p."""
    score = -probabilities
    return score.scatter_add_(1, labels.unsqueeze(1), torch.ones_like(probabilities[:, :1]))


def _draw(probabilities: Tensor, draws: torch.Generator) -> Tensor:
    """One label per row; drawn on the CPU, so that the seed means the same on every device."""
    uniform = torch.rand(len(probabilities), 1, generator=draws).to(probabilities)
    labels = (probabilities.cumsum(dim=1) <= uniform).sum(dim=1)
    return labels.clamp_(max=probabilities.shape[1] - 1)  # a sum may round to less than 1
