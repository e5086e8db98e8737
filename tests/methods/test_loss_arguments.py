"""What every method's loss refuses: a batch, or a model, that it cannot learn from."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import FEATURES, begin, make_model, make_task, train_task
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods import METHODS, make_method

N = 6
every_method = pytest.mark.parametrize("name", [*METHODS, "ewc+replay", "gem+icarl"])
every_setting = pytest.mark.parametrize("setting", ["task", "domain"])

# Of inputs and labels of a batch, and what is said of it.
BAD_BATCHES = {
    "column": (lambda x, y: (x, y[:, None]), ValueError, r"int64 \[6, 1\], .*\[6\].*; pass y.sq"),
    "float": (lambda x, y: (x, y.double()), ValueError, r"float64 \[6\], .* integers .*y.long\(\)"),
    "bool": (lambda x, y: (x, y > 0), ValueError, r"labels y are torch.bool \[6\], .*y.long\(\)"),
    "float column": (
        lambda x, y: (x, y[:, None] * 1.0),
        ValueError,
        r"float32 \[6, 1\], .*y.long\(\)",
    ),
    "one-hot": (lambda x, y: (x, F.one_hot(y, 9)), ValueError, r"\[6, 9\].*y.argmax\(dim=1\)"),
    "swapped": (lambda x, y: (y, x), ValueError, r"labels y are torch.float64 \[6, 5\]"),
    "fewer": (lambda x, y: (x, y[:-1]), ValueError, r"int64 \[5\], .*integers \[6\]"),
    "a number": (lambda x, y: (x, y[0]), ValueError, r"labels y are torch.int64 \[\]"),
    "empty": (lambda x, y: (x[:0], y[:0]), ValueError, r"inputs x are .*\[0, 5\].*at least one"),
    "negative": (lambda x, y: (x, y - 3), ValueError, "labels reach from -[0-9] to "),
    "too large": (lambda x, y: (x, y + 6), ValueError, r"labels reach from \d+ to \d+, .* 0 to"),
    "more rows": (lambda x, y: (x, y, x[:4]), ValueError, r"argument 3 is .*\[4, 5\], expected 6"),
    "alone": (lambda x, _: (x,), TypeError, r"got 1 arguments, .*loss\(x, y\)"),
    "lists": (lambda x, y: (x, y.tolist()), TypeError, r"labels y are list .*as_tensor"),
    "a dict": (lambda x, y: ({"x": x}, y), TypeError, "inputs x are dict, .* of a module"),
}
# What a model makes of its logits, and what is said of it.
BAD_OUTPUTS = {
    "tuple": (
        lambda logits: (logits, None),
        r"returned tuple for \d+ examples, expected logits \[",
    ),
    "column": (lambda logits: logits[:, 0], r"returned \[\d+\] for \d+ examples"),
    "mean": (lambda logits: logits.mean(0, keepdim=True), r"returned \[1, \d\] for \d+ examples"),
    "images": (lambda logits: logits[..., None], r"returned \[\d+, \d, 1\] for"),
}


class Spoiled(nn.Module):
    """A model whose outputs can be made something else."""

    def __init__(self):
        super().__init__()
        self.inner, self.spoil = make_model(), None

    def forward(self, inputs):
        logits = self.inner(inputs)
        return logits if self.spoil is None else self.spoil(logits)


def second_task(name, setting, model=None):
    """A method that has learned a task and begun another, and a batch of that."""
    options = {"features": "inner.2"} if "icarl" in name and model is not None else {}
    method = make_method(name, model or make_model(), **options)
    train_task(method, 0, setting)
    begin(method, 1, setting)
    (inputs, labels), block, _ = make_task(1, setting)
    if method.label.endswith("joint") and setting == "task":  # which has returned global ones
        labels = labels + block.start
    return method, (inputs[:N], labels[:N])


def states(method):
    random = torch.get_rng_state()
    return [copy.deepcopy(part.state_dict()) for part in method.parts], random


def assert_refused(method, batch, kind, message):
    before, random = states(method)
    grads = [entry.grad for entry in method.model.parameters()]
    with pytest.raises(kind, match=f"^(loss: |begin_task: |outputs ).*{message}") as caught:
        method.loss(*batch)
    assert "\n" not in str(caught.value)
    after, random_after = states(method)
    for one, other in zip(before, after, strict=True):
        assert_same_state(one, other)
    assert torch.equal(random, random_after)
    assert [entry.grad for entry in method.model.parameters()] == grads == [None] * len(grads)


@every_setting
@every_method
def test_a_bad_batch_is_refused_by_every_method_and_changes_nothing(name, setting):
    method, batch = second_task(name, setting)
    for spoil, kind, message in BAD_BATCHES.values():
        assert_refused(method, spoil(*batch), kind, message)
    assert method.loss(*batch).isfinite()


@every_setting
@every_method
def test_a_model_without_logits_is_refused_by_every_method(name, setting):
    model = Spoiled()
    method, batch = second_task(name, setting, model)
    for spoil, message in BAD_OUTPUTS.values():
        model.spoil = spoil
        # With active outputs the hook that selects them has its own words.
        said = f"({message}|must return logits)"
        assert_refused(method, batch, ValueError, said)
    model.spoil = None
    assert method.loss(*batch).isfinite()


@every_setting
@every_method
def test_more_than_there_is_to_take_is_refused(name, setting):
    """Such as the number of each example, which some loaders add."""
    method, (inputs, labels) = second_task(name, setting)
    logits = torch.zeros(N, 6, dtype=torch.float64)
    for batch in ((inputs, labels, labels), (inputs, labels, logits, logits)):
        assert_refused(method, batch, TypeError, r"loss\(x, y\)")
    assert method.loss(inputs, labels).isfinite()


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("name", ["baseline", "lwf", "replay", "icarl", "dgr", "joint"])
def test_integers_of_any_width_are_labels(name, dtype):
    losses = []
    for kind in (torch.int64, dtype):
        method, (inputs, labels) = second_task(name, "task")
        losses.append(method.loss(inputs, labels.to(kind)))
    assert torch.equal(*losses)


def test_labels_are_told_where_they_count_from():
    method, (inputs, labels) = second_task("joint", "task")
    with pytest.raises(ValueError, match="from 9 to 9, expected 0 to 3: .* the model's first outp"):
        method.loss(inputs, labels.fill_(9))
    method, (inputs, labels) = second_task("replay", "task")
    with pytest.raises(ValueError, match="from 2 to 3, expected 0 to 1: .*first active output, 2"):
        method.loss(inputs, torch.tensor([2, 3] * 3))
    method, (inputs, labels) = second_task("replay", "domain")
    with pytest.raises(ValueError, match="from 0 to 6, expected 0 to 5: the model has 6 outputs"):
        method.loss(inputs, torch.tensor([0, 6, 1] * 2))


def test_a_loss_that_was_refused_has_not_been_made():
    method = clext.LwF(make_model())
    batch = torch.zeros(N, FEATURES, dtype=torch.float64), torch.zeros(N).long()
    method.loss(*batch)
    method.consolidate()
    with pytest.raises(ValueError, match="labels y"):
        method.loss(batch[0], batch[1][:, None])
    torch.nn.init.zeros_(next(method.model.parameters()))  # as if it had learned
    with pytest.warns(UserWarning, match="was not called in this task"):
        method.consolidate()


def test_a_method_with_rows_of_its_own_gets_them():
    class Weighted(clext.Replay):
        name = "weighted"

        def _begin_task(self, examples):
            return (*examples, torch.full((len(examples[0]),), 0.5).double())

        def _loss(self, *batch):
            inputs, labels, weights = batch
            return super()._loss(inputs, labels) * weights.mean()

    method = Weighted(make_model())
    inputs, labels, weights = begin(method, 0, "domain")
    expected = 0.5 * F.cross_entropy(method.model(inputs), labels)
    torch.testing.assert_close(method.loss(inputs, labels, weights), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.uint32], ids=str)
def test_labels_of_any_integer_type_serve_loss_and_consolidate(dtype):
    for name in ("ewc", "replay", "gem"):
        method = make_method(name, make_model())
        inputs, labels = torch.rand(N, FEATURES).double(), torch.zeros(N).to(dtype)
        method.loss(inputs, labels)
        method.consolidate([(inputs, labels)])


def test_labels_without_values_are_not_looked_at():
    method = clext.EWC(make_model())
    inputs, labels = torch.rand(N, FEATURES).double(), torch.arange(N) % 2
    singly = torch.vmap(lambda x, y: method.loss(x[None], y[None]))(inputs, labels)
    assert torch.allclose(singly.mean(), method.loss(inputs, labels))
    traced = torch.fx.experimental.proxy_tensor.make_fx(method.loss)(inputs, labels)
    assert torch.allclose(traced(inputs, labels), method.loss(inputs, labels))


@every_method
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, y: [(x, y)],
        lambda x, y: {"x": x, "y": y},
        lambda x, y: torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y)),
        lambda x, y: (x, y[:-1]),
        lambda x, y: (x[:0], y[:0]),
        lambda x, y: (x.tolist(), y),
        lambda x, y: (x, y, y),
        lambda x, _: x,
    ],
)
def test_begin_task_refuses_what_is_no_task(name, wrong):
    model = make_model()
    method = make_method(name, model)
    (x, y), *_ = make_task(0, "domain")
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(
        ValueError, match=r": examples for begin_task are .*expected a pair of tensors"
    ):
        method.begin_task(wrong(x, y))
    assert_same_state(method.state_dict(), before)


def test_an_argument_too_many():
    method = clext.EWC(make_model())
    (x, y), *_ = make_task(0, "domain")
    with pytest.raises(TypeError, match=r"got 3 arguments, but ewc takes inputs and labels"):
        method.loss(x, y, y)


@pytest.mark.parametrize("active", [[0, 1], range(0), range(0, 4, 2), 2])
def test_predict_refuses_what_is_no_range(active):
    method = clext.EWC(make_model())
    with pytest.raises(ValueError, match=r"^predict: active must be a range of outputs"):
        method.predict(make_task(0, "domain")[0][0], active=active)
