"""Heads: which of a model's outputs count, in losses, importance and predictions."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clext
from clext.data.scenario import make_scenario
from clext.methods.parts.heads import Heads


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6)).double()


def examples(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1)).double()


def test_the_active_outputs_are_returned_and_the_model_is_not_touched(model):
    x = examples()
    full = model(x)
    heads = Heads(model)
    assert heads(x).equal(full)
    heads.begin_task(range(2, 5), range(2, 5), ended=0)
    assert heads(x).equal(full[:, 2:5])
    assert heads.logits(x).equal(full)
    assert model(x).equal(full)
    assert not model._forward_hooks


def test_the_outputs_seen_are_those_of_all_tasks_in_any_order(model):
    heads = Heads(model)
    assert heads.seen is None
    for ended, block in enumerate([range(4, 6), range(2)]):
        heads.begin_task(block, block, ended=ended)
        assert heads.seen == 6


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda logits: (logits, None),
            r"^the model returned tuple of 2 entries for 9 samples, expected a tensor",
        ),
        (lambda logits: logits[:, 0], r"returned \[9\] for 9 examples"),
        (lambda logits: logits.mean(0, keepdim=True), r"returned .* \[1, 6\] for 9 samples"),
        (lambda logits: logits[..., None], r"returned \[9, 6, 1\] for"),
    ],
)
def test_a_model_without_logits_is_refused(model, spoil, message):
    class Spoiled(nn.Module):
        def forward(self, x):
            return spoil(model(x))

    with pytest.raises(ValueError, match=message):
        Heads(Spoiled()).logits(examples())


# ------------------------------------------------------------------ losses over tasks


@pytest.mark.parametrize(
    ("tasks", "rivals"),
    [
        (  # a head for each task
            [(range(2), range(2)), (range(2, 3), range(2, 3)), (range(3, 6), range(3, 6))],
            lambda label: next([*b] for b in (range(2), range(2, 3), range(3, 6)) if label in b),
        ),
        ([(range(2), range(2)), (range(2, 6), range(6))], lambda _: [*range(6)]),  # one that grows
        ([(range(6), None)], lambda _: [*range(6)]),
        ([], lambda _: [*range(6)]),
    ],
)
def test_each_example_competes_with_the_outputs_of_its_class(model, tasks, rivals):
    x, labels = examples(6), torch.tensor([0, 5, 2, 3, 1, 4])
    heads, expected = Heads(model), []
    for ended, (block, active) in enumerate(tasks):
        heads.begin_task(block, active, ended=ended)
    for entry, label in zip(x, labels.tolist(), strict=True):
        logits = model(entry[None])[0]
        expected.append(torch.logsumexp(logits[rivals(label)], 0) - logits[label])
    torch.testing.assert_close(heads.loss_over_tasks(x, labels), torch.stack(expected).mean())


# ------------------------------------------------------------------ in methods


def test_importance_is_of_the_active_outputs_and_needs_no_fallback(model):
    x, labels = examples(), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 0])
    method = clext.EWC(model)
    method.begin_task(block=range(2, 4), active=range(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.consolidate([(x, labels)])
    squares = torch.zeros_like(model[2].weight)
    for entry, label in zip(x, labels, strict=True):
        loss = F.cross_entropy(model(entry[None])[:, 2:4], label[None])
        squares += torch.autograd.grad(loss, model[2].weight)[0] ** 2
    torch.testing.assert_close(method.importance["2.weight"], squares / len(x))
    assert bool(squares[2:4].any())
    assert not bool(method.importance["2.weight"][[0, 1, 4, 5]].any())


def test_a_run_counts_right_answers_by_head():
    """Of a model that is as it was: the accuracies by hand."""
    torch.manual_seed(0)
    model = nn.Linear(64, 10)
    options = {"dataset": "digits", "scenario": "split", "epochs": 1, "progress": False}
    for incremental in ("task", "class"):
        given = copy.deepcopy(model)
        result = clext.train("baseline", model=given, incremental=incremental, **options)
        assert not given._forward_hooks
        data = clext.data.datasets.load_dataset("digits", show=False)
        scenario = make_scenario("split", data, 5, 0, incremental)
        for k, task in enumerate(scenario.tasks):
            test = task.test()
            among = range(2 * k, 2 * k + 2) if incremental == "task" else range(10)
            answers = given(test.inputs)[:, list(among)].argmax(1) + among[0]
            assert result.accuracy[-1, k] == answers.eq(test.labels).double().mean().item()


def test_an_earlier_head_predicts(model):
    full = model(examples())
    method = clext.Baseline(model)
    method.begin_task(block=range(2), active=range(2))
    method.consolidate()
    method.begin_task(block=range(2, 5), active=range(2, 5))
    assert method.predict(examples(), active=range(2)).equal(full[:, :2])
    assert method.predict(examples()).equal(full[:, 2:5])


def test_a_task_begun_again_takes_its_own_place(model):
    method = clext.Baseline(model)
    for k in range(3):
        for _ in range(2):
            method.begin_task(block=range(2 * k, 2 * k + 2), active=range(2 * k, 2 * k + 2))
        method.consolidate()
    assert method.heads.blocks == [range(2), range(2, 4), range(4, 6)]


@pytest.mark.parametrize(
    ("block", "active", "message"),
    [
        ([0, 1], None, r"block must be a range of outputs.* got \[0, 1\]"),
        (range(2), [0, 1], "active must be a range"),
        (range(0, 4, 2), None, "block must be a range"),
        (range(4, 2), None, "block must be a range"),
        (range(-2, 0), None, "block must be a range"),
        (None, range(2), "needs block"),
        (range(2, 4), range(2), "is not within active"),
    ],
)
def test_ranges_that_are_none_are_refused(model, block, active, message):
    method = clext.Baseline(model)
    with pytest.raises(ValueError, match=message):
        method.begin_task(block=block, active=active)
    assert method.heads.blocks == []


def test_heads_are_said_from_the_first_task_on(model):
    method = clext.Baseline(model)
    method.consolidate()
    with pytest.raises(ValueError, match="of 1 earlier tasks 0 were begun with a block"):
        method.begin_task(block=range(2), active=range(2))


def test_outputs_that_the_model_has_not(model):
    method = clext.Baseline(model)
    with pytest.raises(ValueError, match=r"outputs 0 to 8 are .*\[N, >= 9\], got \[9, 6\]"):
        method.predict(examples(), active=range(9))
    with pytest.raises(ValueError, match=r"^predict: active must be a range of outputs"):
        method.predict(examples(), active=[0, 1])
    method.begin_task(block=range(4, 8), active=range(4, 8))
    with pytest.raises(ValueError, match=r"logits \[N, >= 8\], got \[9, 6\]"):
        method.loss(examples(), torch.zeros(9).long())


def test_a_task_that_is_begun_once_more_takes_the_place_of_itself():
    method = clext.Baseline(nn.Linear(4, 6))
    method.begin_task(block=range(2), active=range(2))
    method.consolidate()
    for block in (range(2, 4), range(4, 6)):
        method.begin_task(block=block, active=block)
    assert method.heads.blocks == [range(2), range(4, 6)]
    method.begin_task()  # all outputs again, and nothing said of them
    assert method.heads.blocks == [range(2)]
    assert method.heads.active is None
