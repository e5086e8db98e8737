"""What every method's loss and beginning take, and refuse."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import FEATURES, begin, make_examples, make_model, run_task
from toy_training import assert_same_state

from clext import EWC, METHODS, Replay
from clext.methods import make_method

every_method = pytest.mark.parametrize("name", [*METHODS, "ewc+replay", "gem+icarl"])


@every_method
def test_a_batch_that_is_none_is_refused_and_changes_nothing(name):
    method = make_method(name, make_model("domain"))
    run_task(method, "domain", 0)
    begin(method, "domain", 1)
    x, y = make_examples("domain", 1)
    before, random = copy.deepcopy(method.state_dict()), torch.get_rng_state()
    for batch, kind, message in (
        (
            (x, y[:, None]),
            ValueError,
            r"^loss: labels y are torch.int64 .*, expected ",
        ),
        ((x,), TypeError, r"^loss: got inputs alone, expected labels too: loss\(x, y\)"),
    ):
        with pytest.raises(kind, match=message):
            method.loss(*batch)
    assert_same_state(method.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert method.loss(x, y).isfinite()


@every_method
def test_what_else_a_loader_gives_is_not_looked_at(name):
    x, y = make_examples("domain", 0)
    losses = []
    for more in ((), (torch.zeros(12).long(), "task 3")):
        method = make_method(name, make_model("domain"))
        method.begin_task((x, y))
        losses.append(method.loss(x, y, *more))
        method.consolidate([(x, y, *more)])
    assert torch.equal(*losses)


@every_method
def test_integers_of_any_width_are_labels(name):
    losses = []
    for dtype in (torch.int64, torch.uint8):
        method = make_method(name, make_model())
        x, y = make_examples("class", 0)
        method.begin_task((x, y.to(dtype)), block=range(2), active=range(2))
        losses.append(method.loss(x, y.to(dtype)))
        method.add_penalty_grad_()
        method.consolidate([(x, y.to(dtype))])
    assert torch.equal(*losses)


@every_method
def test_examples_that_are_no_task_are_refused(name):
    method = make_method(name, make_model("domain"))
    x, y = make_examples("domain", 0)
    before = copy.deepcopy(method.state_dict())
    for wrong in ([(x, y)], {"x": x, "y": y}, (x, y[:-1]), (x[:0], y[:0]), (x, y, y), x):
        with pytest.raises(ValueError, match="^.*: begin_task: examples are .* pair of tensors"):
            method.begin_task(wrong)
    assert_same_state(method.state_dict(), before)


def test_labels_out_of_range_are_torchs_to_refuse():
    method = Replay(make_model("domain"))
    x, _ = make_examples("domain", 0)
    with pytest.raises(IndexError, match="Target 2 is out of bounds"):
        method.loss(x, torch.full((12,), 2))


def test_a_method_with_rows_of_its_own_gets_them():
    class Weighted(Replay):
        name = "weighted"

        def _begin_task(self, examples):
            return (*examples, torch.full((len(examples[0]),), 0.5).double())

        def _loss(self, *batch):
            inputs, labels, weights = batch
            return super()._loss(inputs, labels) * weights.mean()

    method = Weighted(make_model("domain"))
    inputs, labels, weights = begin(method, "domain", 0)
    expected = 0.5 * F.cross_entropy(method.model(inputs), labels)
    torch.testing.assert_close(method.loss(inputs, labels, weights), expected)


def test_a_loss_can_be_traced():
    method = EWC(make_model())
    x, y = torch.rand(6, FEATURES).double(), torch.arange(6) % 2
    singly = torch.vmap(lambda x, y: method.loss(x[None], y[None]))(x, y)
    assert torch.allclose(singly.mean(), method.loss(x, y))
    traced = torch.fx.experimental.proxy_tensor.make_fx(method.loss)(x, y)
    assert torch.allclose(traced(x, y), method.loss(x, y))
