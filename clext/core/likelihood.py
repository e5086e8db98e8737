"""Likelihoods of labels given outputs: their loss, their score, and which labels they take."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from clext.core.inputs import described
from clext.core.lists import state_dtype

if TYPE_CHECKING:
    from collections.abc import Iterator

CATEGORICAL = "categorical"
GAUSSIAN = "gaussian"
IGNORED = -100  # the label of a position that does not count, as in torch's cross_entropy

_REMEDY = (
    "pass y.squeeze(1) of a column, y.argmax(dim=1) of one-hot rows, y.long() of floats, or say "
    'likelihood="bernoulli" or "gaussian"'
)


class Likelihood:
    """Of labels given outputs [N, ...]; log p of a sample is the sum over all its positions."""

    name: ClassVar[str]

    def fitted(self, owner: str, outputs: Tensor, labels: Tensor) -> Tensor:
        """The labels as the other methods take them; ValueError if they do not fit the outputs.

        No value is looked at, so no device is waited for.
        """
        raise NotImplementedError

    def check_values(self, owner: str, outputs: Tensor, labels: Tensor) -> None:
        """ValueError for labels, as `fitted` returned them, that have no likelihood."""

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over the positions of each sample, [N]."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean loss over all positions of all samples, 0-dim, as torch's function has it."""
        raise NotImplementedError

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """D log p(labels) / d outputs, shaped as the outputs, in their state dtype."""
        raise NotImplementedError

    def drawn_score(self, outputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        """As `score`, for labels drawn from p (on the CPU: the same on every device)."""
        raise NotImplementedError

    def weighted_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:
        """Scores whose squares add up to the expectation over p of the squared score."""
        raise NotImplementedError


class _Categorical(Likelihood):
    """Softmax over dimension 1 of outputs [N, C, ...], as in torch's cross_entropy.

    Positions with the label -100 do not count.
    """

    name: ClassVar[str] = CATEGORICAL

    def fitted(self, owner: str, outputs: Tensor, labels: Tensor) -> Tensor:
        labels = integers(owner, labels)
        shape = outputs.shape
        if outputs.dim() < 2 or labels.shape != shape[:1] + shape[2:]:
            raise ValueError(
                f"{owner}: labels y are {described(labels)} for outputs {list(shape)}, expected "
                f"integers {list(shape[:1] + shape[2:])}, a class for each; {_REMEDY}"
            )
        if shape[1] < 2:
            raise ValueError(
                f"{owner}: the model has one output, and a single class has probability 1 whatever "
                'the model; say likelihood="bernoulli" for a binary label, "gaussian" for a number'
            )
        return labels

    def check_values(self, owner: str, outputs: Tensor, labels: Tensor) -> None:
        counted = labels.masked_fill(labels == IGNORED, 0)
        low, high = int(counted.min()), int(counted.max())
        if low < 0 or high >= outputs.shape[1]:
            raise ValueError(
                f"{owner}: labels reach from {low} to {high}, expected 0 to {outputs.shape[1] - 1}"
                ": they count from the first active output; -100 is that of what is to be left out"
            )

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs, labels, reduction="none")
        if labels.dim() == 1:
            return losses
        counts = (labels != IGNORED).flatten(1).sum(1).clamp_(min=1)
        return losses.flatten(1).sum(1) / counts

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs, labels)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return _one_hot_minus(_probabilities(outputs), labels, labels)

    def drawn_score(self, outputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        p = _probabilities(outputs)
        uniform = torch.rand((len(p), 1, *p.shape[2:]), generator=draws).to(p)
        drawn = (p.cumsum(dim=1) <= uniform).sum(dim=1)
        drawn = drawn.clamp_(max=p.shape[1] - 1)  # a sum may round to less than 1
        return _one_hot_minus(p, drawn, labels)

    def weighted_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:
        p = _probabilities(outputs).reshape(*outputs.shape[:2], -1)
        known = labels.reshape(len(labels), -1)
        # Positions are independent given the inputs: one at a time.
        for t in range(p.shape[2]):
            for label in range(p.shape[1]):
                same = torch.full_like(known[:, t], label)
                # Squared later, so that the label counts with its probability.
                weight = p[:, label : label + 1, t].sqrt()
                score = torch.zeros_like(p)
                score[:, :, t] = weight * _one_hot_minus(p[:, :, t], same, known[:, t])
                yield score.reshape(outputs.shape)


class _OfNumbers(Likelihood):
    """Independent outputs, each with a number for a label: labels are shaped as the outputs."""

    def fitted(self, owner: str, outputs: Tensor, labels: Tensor) -> Tensor:
        if labels.shape != outputs.shape and (*labels.shape, 1) != outputs.shape:
            raise ValueError(
                f"{owner}: labels y are {described(labels)}, expected {list(outputs.shape)}: a "
                f'number for each output with likelihood="{self.name}"'
            )
        return labels.reshape(outputs.shape).to(state_dtype(outputs.dtype))

    def losses(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self._each(outputs, labels).reshape(len(outputs), -1).mean(1)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return self._each(outputs, labels).mean()

    def _each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        raise NotImplementedError

    def _deviation(self, outputs: Tensor) -> Tensor:
        """The standard deviation of the score of each output."""
        raise NotImplementedError

    def weighted_scores(self, outputs: Tensor, labels: Tensor) -> Iterator[Tensor]:  # noqa: ARG002
        deviation = self._deviation(outputs.to(state_dtype(outputs.dtype)))
        deviation = deviation.reshape(len(outputs), -1)
        for k in range(deviation.shape[1]):
            one = torch.zeros_like(deviation)
            one[:, k] = deviation[:, k]
            yield one.reshape(outputs.shape)


class _Bernoulli(_OfNumbers):
    """Outputs [N, ...] are logits of independent labels from 0 to 1."""

    name: ClassVar[str] = "bernoulli"

    def check_values(self, owner: str, outputs: Tensor, labels: Tensor) -> None:  # noqa: ARG002
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError(
                f"{owner}: labels y reach from {float(labels.min())} to {float(labels.max())}, "
                'expected 0 to 1 with likelihood="bernoulli"'
            )

    def _each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(outputs, labels.to(outputs), reduction="none")

    def _deviation(self, outputs: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt()

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return labels - outputs.to(labels.dtype).sigmoid()

    def drawn_score(self, outputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        p = outputs.to(labels.dtype).sigmoid()
        return (torch.rand(p.shape, generator=draws).to(p) < p).to(p) - p


class _Gaussian(_OfNumbers):
    """Labels are outputs [N, ...] and noise of variance 1; the loss is torch's mean square."""

    name: ClassVar[str] = GAUSSIAN

    def _each(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs, labels.to(outputs), reduction="none")

    def _deviation(self, outputs: Tensor) -> Tensor:
        return torch.ones_like(outputs)

    def score(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return labels - outputs.to(labels.dtype)

    def drawn_score(self, outputs: Tensor, labels: Tensor, draws: torch.Generator) -> Tensor:
        return torch.randn(outputs.shape, generator=draws).to(labels)


LIKELIHOODS: dict[str, Likelihood] = {
    kind.name: kind() for kind in (_Categorical, _Bernoulli, _Gaussian)
}


def integers(owner: str, labels: Tensor) -> Tensor:
    """Labels as int64; ValueError for numbers that are no integers."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise ValueError(
            f"{owner}: labels y are {described(labels)}, expected integers, a class for each of "
            f"the inputs x; {_REMEDY}"
        )
    return labels.long()  # torch has no minimum for all types of integers


def _probabilities(logits: Tensor) -> Tensor:
    return logits.to(state_dtype(logits.dtype)).softmax(dim=1)


def _one_hot_minus(probabilities: Tensor, labels: Tensor, known: Tensor) -> Tensor:
    """D log p(label) / d logits: one at the label, minus p; 0 where the one known is ignored."""
    score = -probabilities
    place = labels.clamp(min=0).unsqueeze(1)
    score.scatter_add_(1, place, torch.ones_like(probabilities[:, :1]))
    return score.mul_((known != IGNORED).unsqueeze(1))
