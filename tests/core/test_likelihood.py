"""Likelihoods: loss and score against torch's functions and autograd, and labels they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clext.core.likelihood import LIKELIHOODS
from clext.core.seeding import generator

torch.manual_seed(0)
CASES = {
    "classes": ("categorical", (5, 3), torch.randint(3, (5,))),
    "pixels": ("categorical", (5, 3, 2, 4), torch.randint(3, (5, 2, 4))),
    "tokens": ("categorical", (5, 3, 4), torch.tensor([[0, -100, 2, 1]] * 4 + [[-100] * 4])),
    "ignored": ("categorical", (5, 3), torch.tensor([0, -100, 2, 1, -100])),
    "binary": ("bernoulli", (5,), torch.randint(2, (5,))),
    "column": ("bernoulli", (5, 1), torch.rand(5)),
    "multi-label": ("bernoulli", (5, 3), torch.randint(2, (5, 3)).bool()),
    "numbers": ("gaussian", (5, 3, 2), torch.randn(5, 3, 2)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    name, shape, labels = request.param
    outputs = torch.randn(shape, dtype=torch.float64, generator=generator(1))
    likelihood = LIKELIHOODS[name]
    return likelihood, outputs, likelihood.fitted("EWC", outputs, labels)


def log_p(likelihood, outputs, labels):
    """Of each sample, [N], by torch's functions."""
    if likelihood.name == "categorical":
        each = -F.cross_entropy(outputs, labels, reduction="none")
    elif likelihood.name == "bernoulli":
        each = -F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    else:
        each = -(outputs - labels).square() / 2
    return each.reshape(len(outputs), -1).sum(1)


def test_the_score_is_the_gradient_of_log_p(case):
    likelihood, outputs, labels = case
    leaf = outputs.clone().requires_grad_()
    log_p(likelihood, leaf, labels).sum().backward()
    torch.testing.assert_close(likelihood.score(outputs, labels), leaf.grad, rtol=1e-12, atol=1e-15)


def test_weighted_scores_are_the_mean_square_of_drawn_ones(case):
    likelihood, outputs, labels = case
    expected = sum(score.square() for score in likelihood.weighted_scores(outputs, labels))
    draws, total, count = generator(0), torch.zeros_like(outputs), 4000
    for _ in range(count):
        total += likelihood.drawn_score(outputs, labels, draws).square()
    torch.testing.assert_close(total / count, expected, rtol=0.1, atol=0.02)


def test_the_loss_is_torchs_mean(case):
    likelihood, outputs, labels = case
    if likelihood.name == "categorical":
        counted = (labels != -100).sum()
        expected = -log_p(likelihood, outputs, labels).sum() / counted
    elif likelihood.name == "bernoulli":
        expected = F.binary_cross_entropy_with_logits(outputs, labels)
    else:
        expected = F.mse_loss(outputs, labels)
    torch.testing.assert_close(likelihood.loss(outputs, labels), expected)
    losses = likelihood.losses(outputs, labels)
    assert losses.shape == (5,)
    for n in range(5):
        one = likelihood.loss(outputs[n : n + 1], labels[n : n + 1])
        torch.testing.assert_close(losses[n], torch.nan_to_num(one))  # no position counts: 0


@pytest.mark.parametrize(
    ("name", "shape", "labels", "message"),
    [
        ("categorical", (2, 1), torch.zeros(2).long(), "the model has one output, .*bernoulli"),
        (
            "categorical",
            (2, 3),
            torch.zeros(2, 3).long(),
            r"for outputs \[2, 3\], expected integers",
        ),
        ("categorical", (2, 3), torch.zeros(2), "labels y are torch.float32"),
        ("categorical", (2, 3), torch.zeros(2).bool(), "labels y are torch.bool"),
        ("categorical", (2,), torch.zeros(2).long(), r"for outputs \[2\]"),
        (
            "bernoulli",
            (2, 3),
            torch.zeros(2),
            r"labels y are torch.float32 \[2\], expected \[2, 3\]",
        ),
        (
            "gaussian",
            (2,),
            torch.zeros(2, 1),
            r"labels y are torch.float32 \[2, 1\], expected \[2\]",
        ),
    ],
)
def test_labels_that_do_not_fit_the_outputs_are_refused(name, shape, labels, message):
    with pytest.raises(ValueError, match=f"^EWC: .*{message}"):
        LIKELIHOODS[name].fitted("EWC", torch.zeros(shape), labels)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        ("categorical", torch.tensor([0, 99]), "labels reach from 0 to 99, expected 0 to 1"),
        ("categorical", torch.tensor([0, -1]), "labels reach from -1 to 0"),
        ("bernoulli", torch.tensor([[0.0, 2.0]] * 2), "from 0.0 to 2.0, expected 0 to 1"),
    ],
)
def test_labels_without_a_likelihood_are_refused(name, labels, message):
    outputs = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=message):
        LIKELIHOODS[name].check_values("EWC", outputs, labels)
