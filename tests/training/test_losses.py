"""A loss of the user's, label smoothing, and steps counted in place of epochs."""

import pytest
import torch
import torch.nn.functional as F
from quick_runs import QUICK, SPLIT, same, small, weights
from torch import nn

import clext

HEADS = {**SPLIT, "incremental": "task"}


def own_cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


@pytest.mark.parametrize("options", [QUICK, SPLIT, HEADS], ids=["domain", "class", "task"])
@pytest.mark.parametrize(
    "method", ["ewc", "replay", "derpp", "er-ace", "joint", "gem", "lwf", "si+replay"]
)
def test_the_cross_entropy_as_ones_own_changes_nothing(method, options):
    own = clext.train(method, model=small(), loss=own_cross_entropy, **options)
    usual = clext.train(method, model=small(), **options)
    assert own.curve == usual.curve
    for ours, theirs in zip(weights(own.model), weights(usual.model), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    assert own.config["loss"] == "own_cross_entropy"


def test_label_smoothing_is_that_of_torch():
    loss = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")
    by_name = clext.train("ewc", model=small(), label_smoothing=0.2, **QUICK)
    by_hand = clext.train("ewc", model=small(), loss=loss, **QUICK)
    without = clext.train("ewc", model=small(), **QUICK)
    assert same(weights(by_name.model), weights(by_hand.model))
    assert not same(weights(by_name.model), weights(without.model))


def test_each_task_is_smoothed_over_its_own_outputs():
    """Of a head for each task the other heads' outputs are no rivals, also of replayed examples."""
    model = small()
    method = clext.Replay(model)
    x, first, second = torch.randn(6, 64), torch.arange(6) % 2, torch.arange(6) % 2
    method.begin_task(block=range(2), active=range(2))
    method.consolidate([(x, first)])
    method.begin_task(block=range(2, 4), active=range(2, 4))
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.3, reduction="none")
    with method.heads.trained_on(smoothed), torch.no_grad():
        labels = torch.cat([first, second + 2])
        found = method.heads.loss_over_tasks(torch.cat([x, x]), labels, reduction="none")
        mean = method.heads.loss_over_tasks(torch.cat([x, x]), labels)
    logits = model(x).detach()
    expected = torch.cat([smoothed(logits[:, :2], first), smoothed(logits[:, 2:4], second)])
    assert torch.allclose(found, expected)
    assert torch.allclose(mean, expected.mean())


def test_what_a_method_measures_stays_that_of_the_likelihood():
    model, x, y = small(), torch.randn(20, 64), torch.arange(20) % 10
    plain, smoothed = clext.EWC(model), clext.EWC(model)
    plain.consolidate([(x, y)])
    with smoothed.heads.trained_on(nn.CrossEntropyLoss(label_smoothing=0.5, reduction="none")):
        smoothed.consolidate([(x, y)])
    for name, importance in plain.importance.items():
        assert importance.equal(smoothed.importance[name])


def test_a_method_of_ones_own_has_its_loss_again_afterwards():
    method, x, y = clext.SI(small()), torch.randn(5, 64), torch.arange(5)
    clext.train(method, label_smoothing=0.5, **QUICK)
    assert torch.allclose(method.loss(x, y), F.cross_entropy(method.model(x), y))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "mse"}, r"loss must be a function \(logits, labels\)"),
        ({"loss": own_cross_entropy, "label_smoothing": 0.1}, "leave it to your loss"),
        ({"label_smoothing": 1.5}, "label_smoothing must be a finite number >= 0 and <= 1"),
        ({"loss": F.cross_entropy}, r'a loss for each, \[128\]; of torch.s give reduction="none"'),
        ({"iterations": 5}, "epochs=2 and iterations=5; give one of them"),
        ({"iterations": 0, "epochs": None}, "iterations must be an integer >= 1"),
    ],
)
def test_one_sentence(options, said):
    with pytest.raises(ValueError, match=said):
        clext.train("si", model=small(), **{**QUICK, **options})


class TestIterations:
    def test_as_many_steps_whatever_the_size_of_the_data(self):
        steps = []

        class Count(clext.Callback):
            def on_task_end(self, training):
                steps.append(training.total_steps)

        options = {name: value for name, value in QUICK.items() if name != "epochs"}
        result = clext.train("si", model=small(), iterations=37, callbacks=[Count()], **options)
        assert "37 steps each" in str(result)
        assert steps == [37, 74]
        assert len(result.curve) == 2
        assert result.config["iterations"] == 37
        assert result.config["epochs"] == 1

    def test_those_of_an_epoch_are_an_epoch(self):
        """1,442 digits are 11 batches of 128 and one of 34, which is filled from the next pass."""
        passes = []

        class Spy(clext.Baseline):
            def loss(self, *batch):
                passes.append(batch[1])
                return super().loss(*batch)

        one = {"dataset": "digits", "tasks": 1, "progress": False}
        clext.train(Spy(small()), iterations=12, **one)
        assert [len(labels) for labels in passes] == [128] * 12
        counts = torch.cat(passes)[:1442].bincount()
        passes.clear()
        clext.train(Spy(small()), epochs=1, **one)
        assert torch.cat(passes).bincount().equal(counts)
