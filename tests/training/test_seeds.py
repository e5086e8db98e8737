"""`train(seeds=...)`: a run for each seed, on CUDA all of them in one graph."""

import copy
from functools import partial

import pytest
import torch
from quick_runs import QUICK, same, small, weights

import clext
from clext.training import task as tasks
from clext.training import train as training
from clext.training.graphs import WARM_UP_STEPS, GraphedSteps, Recording, StepsTogether
from clext.training.loop import NonFiniteLossError, Training
from clext.training.machine import resolve_device
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings

SEEDS = (3, 0, 8)
FAST = QUICK | {"model": "mlp-32", "lr": 1e-2}


def alone(method, **options):
    return [clext.train(method, seed=seed, **FAST, **options) for seed in SEEDS]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert same(weights(one.model), weights(other.model))
        assert one.task_curve == other.task_curve
        assert one.config["seeds"] == other.config["seeds"]
        assert one.complete


@pytest.fixture
def recorded(monkeypatch):
    """As on CUDA, with a stand-in for the graph; the functions that were recorded."""
    functions = []

    def capture(function):
        functions.append(function)
        return function

    def together(_method, _optimizer, _examples):
        return partial(GraphedSteps, recording=partial(Recording, capture=capture))

    monkeypatch.setattr(training, "can_record", lambda _method, _device: True)
    monkeypatch.setattr(tasks, "graphed_or_not", together)
    return functions


def test_one_run_after_the_other_where_nothing_is_recorded():
    assert_equal(clext.train("si", seeds=SEEDS, **FAST), alone("si"))


@pytest.mark.parametrize("method", ["si", "ewc", "rwalk", "mas"])
def test_runs_in_one_recording_have_the_bits_that_they_have_alone(recorded, method):
    found = clext.train(method, seeds=SEEDS, **FAST)
    assert_equal(found, alone(method))


def test_a_recording_serves_all_runs_for_a_task(recorded):
    found = clext.train("si", seeds=SEEDS, **FAST)
    assert len(recorded) == found[0].config["tasks"]


def test_runs_whose_steps_are_not_recorded_take_turns(recorded, monkeypatch):
    monkeypatch.setattr(tasks, "graphed_or_not", lambda *_: tasks.TaskSteps)
    assert_equal(clext.train("ewc", seeds=SEEDS, **FAST), alone("ewc"))
    assert not recorded


def test_epochs_of_different_lengths():
    """The whole batches that only some runs have are launched."""
    models, runs, recorded = [small() for _ in range(4)], [], []

    def capture(function):
        recorded.append(function)
        return function

    recording = partial(Recording, capture=capture)
    for model, examples in zip(models, (90, 170, 90, 170), strict=True):
        method, parameters = clext.SI(model), [*model.parameters()]
        optimizer = TaskOptimizer(Settings(lr=1e-2), method, parameters, torch.device("cpu"))
        x = torch.rand(examples, 64, generator=torch.Generator().manual_seed(1))
        own = method.begin_task((x, torch.arange(examples) % 10))
        runs.append(GraphedSteps(method, optimizer, own, 16, "fp32", recording=recording))
    together, done = StepsTogether(runs[:2]), [0, 0]

    def count(place):
        done[place] += 1

    for epoch in range(2):
        orders = [
            torch.randperm(n, generator=torch.Generator().manual_seed(epoch)) for n in (90, 170)
        ]
        found = together.train_on(orders, [partial(count, 0), partial(count, 1)])
        for losses, order, run in zip(found, orders, runs[2:], strict=True):
            assert losses.equal(run.train_on(order, lambda: None))
    assert done == [2 * 6, 2 * 11]
    for place in (0, 1):
        assert same(weights(models[place]), weights(models[place + 2]))


def test_each_run_has_its_folder(tmp_path, recorded):
    found = clext.train("si", seeds=range(2), out=tmp_path, **FAST)
    for seed, result in enumerate(found):
        kept = clext.Result.load(tmp_path / f"seed-{seed}")
        assert kept.average_accuracy == result.average_accuracy
        assert (tmp_path / f"seed-{seed}" / "model.safetensors").is_file()
        assert not (tmp_path / f"seed-{seed}" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("kind", ["cpu", "recorded"])
def test_a_folder_that_is_taken_is_refused_before_any_work(tmp_path, kind, request):
    if kind == "recorded":
        request.getfixturevalue("recorded")
    clext.train("si", seeds=[0], out=tmp_path, **FAST)
    with pytest.raises(OSError, match="seed-0"):
        clext.train("si", seeds=[1, 0], out=tmp_path, **FAST)
    assert [entry.name for entry in tmp_path.iterdir()] == ["seed-0"]


def test_a_run_that_diverges_ends_all_and_says_which(tmp_path, recorded, monkeypatch):
    """The weights of one of the three become NaN in its second epoch."""
    done = Training.epoch_done

    def spoilt(run, losses):
        if run.settings.seed == SEEDS[1] and run.place.epoch == 1:
            losses = losses * float("nan")
        done(run, losses)

    monkeypatch.setattr(Training, "epoch_done", spoilt)
    with pytest.raises(NonFiniteLossError, match="the loss became nan at task 1") as caught:
        clext.train("si", seeds=SEEDS, out=tmp_path, **FAST)
    assert caught.value.result.config["seed"] == SEEDS[1]
    stopped = [clext.Result.load(tmp_path / f"seed-{seed}").stopped for seed in SEEDS]
    assert stopped[0] == stopped[2] == f"ended with the run of seed {SEEDS[1]}"
    assert "the loss became nan" in stopped[1]


class Blur(torch.nn.Module):
    """A generator of a user's own."""

    def __init__(self):
        super().__init__()
        self.middle = torch.nn.Parameter(torch.full((64,), 0.1))

    def loss(self, inputs):
        return (inputs - self.middle).square().sum(1).mean()

    def sample(self, count, generator):
        return self.middle + torch.randn(count, 64, generator=generator)


def test_modules_among_the_options_are_of_each_run():
    generator = Blur()
    found = clext.train("dgr", seeds=SEEDS[:2], generator=generator, **FAST)
    for one, seed in zip(found, SEEDS, strict=False):
        other = clext.train("dgr", seed=seed, generator=copy.deepcopy(generator), **FAST)
        assert same(weights(one.model), weights(other.model))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": []}, "train: expected seeds as a list of numbers"),
        ({"seeds": 3}, "train: expected seeds as a list of numbers"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"seeds": [[0, 1]]}, "train: expected seeds as a list of numbers"),
        ({"seeds": range(2000)}, "train: expected at most 1,000 seeds, got more"),
        ({"seeds": [0], "seed": 1}, "expected seed or seeds"),
        ({"seeds": [0], "model": torch.nn.Linear(64, 10)}, "give both by name"),
        ({"seeds": [0], "callbacks": [clext.Callback()]}, "are of one run"),
        ({"seeds": [0], "out": "x", "resume": True}, "are of one run"),
    ],
)
def test_what_cannot_be_is_said(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        clext.train("si", **FAST | given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_cuda_graph_of_many_runs(device):
    options = FAST | {"device": str(resolve_device(device))}
    found = clext.train("si", seeds=SEEDS, **options)
    for one, seed in zip(found, SEEDS, strict=True):
        other = clext.train("si", seed=seed, **options)
        torch.testing.assert_close(weights(one.model), weights(other.model), rtol=1e-3, atol=1e-4)


def test_the_warm_up_is_of_all_runs(recorded):
    """Fewer steps than it takes: nothing is recorded."""
    few = FAST | {"epochs": None, "iterations": WARM_UP_STEPS}
    clext.train("si", seeds=SEEDS, **few)
    assert not recorded
