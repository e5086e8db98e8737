"""`ClextPlugin` in a strategy of Avalanche's, against the loop written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from framework_loops import plain_loop
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_training import FEATURES, assert_same_state, make_model

import clext

pytest.importorskip("avalanche")
from avalanche.benchmarks.scenarios import (
    class_incremental_benchmark,
    task_incremental_benchmark,
    with_classes_timeline,
)
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.models import (
    IncrementalClassifier,
    MultiHeadClassifier,
    MultiTaskModule,
)
from avalanche.models.dynamic_modules import avalanche_model_adaptation
from avalanche.training.templates import SupervisedTemplate

from clext.integrations.avalanche import ClextPlugin

BATCH = 4


class Growing(nn.Module):
    """A head that gets the classes of an experience when it begins."""

    def __init__(self):
        super().__init__()
        self.net = make_model(torch.float32)[:2]
        self.head = IncrementalClassifier(6, initial_out_features=2)

    def forward(self, x):
        return self.head(self.net(x))


class Heads(MultiTaskModule):
    def __init__(self):
        super().__init__()
        self.net = make_model(torch.float32)[:2]
        self.head = MultiHeadClassifier(6, initial_out_features=2, masking=False)

    def forward(self, x, task_labels):
        return self.head(self.net(x), task_labels)


def examples(number):
    """Two classes of their own, 22 examples."""
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(22, FEATURES, generator=generator)
    return x, torch.randint(2, (22,), generator=generator) + 2 * number


def benchmark():
    """Two experiences with two classes each."""
    x, y = map(torch.cat, zip(*map(examples, range(2)), strict=True))
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    streams = {"train": as_classification_dataset(data)}
    return class_incremental_benchmark(streams, num_experiences=2, class_order=[0, 1, 2, 3])


def with_task_labels():
    return with_classes_timeline(task_incremental_benchmark(benchmark()))


def batches(experience):
    """(x, y), or with the task's label (x, y, t)."""
    return list(DataLoader(list(experience.dataset), batch_size=BATCH))


def learned(method, experiences, optimizer=None):
    strategy = SupervisedTemplate(
        model=method.model,
        optimizer=optimizer or torch.optim.SGD(method.model.parameters(), lr=0.1),
        criterion=F.cross_entropy,
        train_mb_size=BATCH,
        plugins=[ClextPlugin(method)],
        evaluator=None,
    )
    for experience in experiences:
        torch.manual_seed(3)  # of the head's new rows
        strategy.train(experience, shuffle=False)


def looped(method, experiences, loss):
    for experience in experiences:
        torch.manual_seed(3)
        avalanche_model_adaptation(method.model, experience)
        method.begin_task()
        optimizer = torch.optim.SGD(method.model.parameters(), lr=0.1)
        losses = [lambda batch=batch: loss(*batch) for batch in batches(experience)]
        plain_loop(method, optimizer, losses)
        method.consolidate(batches(experience))


def assert_same(method, oracle):
    assert_same_state(dict(method.model.state_dict()), dict(oracle.model.state_dict()))
    assert_same_state(method.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("kind", [clext.SI, clext.EWC])
def test_a_head_that_grows(kind):
    method, oracle = kind(Growing()), kind(Growing())
    learned(method, benchmark().train_stream)
    looped(
        oracle,
        benchmark().train_stream,
        lambda x, y: F.cross_entropy(oracle.model(x), y),
    )
    assert method.tasks == 2
    assert method.importance["head.classifier.weight"].shape == (4, 6)
    assert_same(method, oracle)


def test_a_head_for_each_task():
    def task_aware(model, batch):
        return model(batch[0], batch[2])

    method, oracle = (clext.EWC(Heads(), forward=task_aware) for _ in range(2))
    learned(method, with_task_labels().train_stream)

    looped(
        oracle,
        with_task_labels().train_stream,
        lambda x, y, t: F.cross_entropy(oracle.model(x, t), y),
    )
    assert_same(method, oracle)


def test_replay_makes_the_loss():
    method, oracle = clext.Replay(Growing()), clext.Replay(Growing())
    learned(method, benchmark().train_stream)
    looped(oracle, benchmark().train_stream, oracle.loss)
    assert_same(method, oracle)


def test_importance_from_the_optimizer_of_the_strategy():
    method, oracle = (clext.EWC(Growing(), fisher="optimizer") for _ in range(2))
    adams = [torch.optim.Adam(entry.model.parameters(), lr=0.01) for entry in (method, oracle)]
    experience = benchmark().train_stream[0]
    learned(method, [experience], adams[0])
    losses = [lambda x=x, y=y: F.cross_entropy(oracle.model(x), y) for x, y in batches(experience)]
    avalanche_model_adaptation(oracle.model, experience)
    plain_loop(oracle, adams[1], losses)
    oracle.consolidate(adams[1])
    assert_same(method, oracle)


# ----------------------------------------------------------------------------- refused


def test_a_method_of_another_model():
    method = clext.SI(Growing())
    message = "ClextPlugin: 0 optimizers step parameters of the model that si was made for"
    strategy = SupervisedTemplate(
        model=(model := Growing()),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        plugins=[ClextPlugin(method)],
        evaluator=None,
    )
    with pytest.raises(ValueError, match=message):
        strategy.train(benchmark().train_stream[0])


def test_an_optimizer_that_has_the_method():
    method = clext.SI(Growing())
    optimizer = clext.optim.SGD(method.model.parameters(), lr=0.1, method=method)
    with pytest.raises(ValueError, match="make it without method="):
        learned(method, benchmark().train_stream, optimizer)


def test_no_method():
    with pytest.raises(TypeError, match="ClextPlugin: expected a method of clext, got Growing"):
        ClextPlugin(Growing())
