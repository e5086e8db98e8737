"""Protocols of published numbers (bench/published): every row trains, as its protocol says."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clext.core.seeding import Seeds
from clext.data.datasets import Dataset, Split

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip("bench/ is absent", allow_module_level=True)

NAMES = [
    *("zenke2017", "vandeven2018", "vandeven2018-split", "agem2019", "der2020"),
    *("kfac", "kfac-50", "vandeven2025"),
]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture(scope="module")
def data():
    random = torch.Generator().manual_seed(0)

    def split(examples):
        return Split(
            torch.rand(examples, 784, generator=random),
            torch.arange(examples).remainder(10),
        )

    return Dataset("random", split(5060), split(20), 10, "made up")


@pytest.mark.parametrize("name", NAMES)
def test_every_row_trains_and_goes_on_from_its_checkpoint(bench, data, name, tmp_path):
    published, reproduce = bench("published.tables"), bench("published.reproduce")
    iterations = bench("published.protocols").iterations
    whole = published.PROTOCOLS[name]
    tasks = 5 if whole.scenario == "split" else 2
    protocol = replace(whole, tasks=tasks, hidden=(6,), order=iterations(12, 5))
    small = replace(data, train=Split(data.train.inputs[-60:], data.train.labels[-60:]))
    used = data if name == "agem2019" else small
    for row in whole.rows:
        device = torch.device("cpu")
        first = reproduce.Training(protocol, row, used, 0, device)
        first.learn_task()
        first.save(tmp_path / "row.pt")
        first.learn_task()
        assert len(first.curve) == 2
        assert all(0 <= accuracy <= 1 for row in first.accuracies for accuracy in row)
        resumed = reproduce.Training(protocol, row, used, 0, device)
        resumed.load(tmp_path / "row.pt")
        resumed.learn_task()
        assert resumed.accuracies == first.accuracies


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_draws_comes_from_the_seed_of_the_run(bench, data, name):
    protocol = replace(bench("published.tables").PROTOCOLS[name], tasks=5, hidden=(6,))
    for row in protocol.rows:
        for seed in (0, 1):
            made = bench("published.reproduce").Training(
                protocol, row, data, seed, torch.device("cpu")
            )
            given = Seeds.derive(seed).method
            assert getattr(made.method, "seed", given) == given, row.name


def test_joint_training_in_one_pass_learns_in_the_last_task_alone(bench, data):
    published, reproduce = bench("published.tables"), bench("published.reproduce")
    protocol = replace(published.DARK, tasks=2, hidden=(6,))
    row = protocol.rows[0]
    training = reproduce.Training(protocol, row, data, 0, torch.device("cpu"))
    before = [entry.detach().clone() for entry in training.method.model.parameters()]
    training.learn_task()
    assert all(map(torch.equal, before, training.method.model.parameters()))
    training.learn_task()
    assert not any(map(torch.equal, before, training.method.model.parameters()))
    assert reproduce.kept_bytes(training.method) == 2 * 5060 * (784 * 4 + 8)


def test_names_of_tables_are_those_that_are_tested(bench):
    assert list(bench("published.tables").PROTOCOLS) == NAMES


def test_epochs_see_everything_and_iterations_whole_batches_alone(bench):
    published = bench("published.protocols")
    random = torch.Generator().manual_seed(0)
    batches = list(published.epochs(2, 4)(10, random))
    assert [len(rows) for rows in batches] == [4, 4, 2] * 2
    assert torch.equal(torch.cat(batches[:3]).sort().values, torch.arange(10))
    batches = list(published.iterations(5, 4)(10, random))
    assert [len(rows) for rows in batches] == [4] * 5
    for start in (0, 2):
        assert len(torch.cat(batches[start : start + 2]).unique()) == 8


def test_published_and_ours_are_compared_by_the_tolerance(bench):
    published, verdict = bench("published.tables"), bench("published.protocols").verdict
    row = published.VAN_DE_VEN.rows[1]
    assert verdict(row, row.published + row.tolerance - 0.01) == "agrees"
    assert verdict(row, row.published + row.tolerance + 0.01) == "differs"
    assert verdict(next(r for r in published.A_GEM.rows if not r.published), 50.0) == ""


def test_shuffled_classes_are_other_numbers_for_the_same_examples(bench, data):
    shuffled = bench("published.protocols").with_shuffled_classes(data, 3)
    pairs = {*zip(data.train.labels.tolist(), shuffled.train.labels.tolist(), strict=True)}
    assert sorted(old for old, _ in pairs) == sorted(new for _, new in pairs) == [*range(10)]
    assert any(old != new for old, new in pairs)
    assert {*zip(data.test.labels.tolist(), shuffled.test.labels.tolist(), strict=True)} <= pairs
    assert shuffled.train.inputs is data.train.inputs


def test_padding_puts_the_image_in_the_middle(bench, data):
    train, test = bench("published.tables").padded(data)
    assert train.inputs.shape == (5060, 1024)
    images = test.inputs.view(-1, 32, 32)
    assert torch.equal(images[:, 2:30, 2:30].reshape(20, -1), data.test.inputs)
    assert torch.isclose(images.sum(), data.test.inputs.sum())


def test_ewc_of_the_released_code_averages_squared_task_gradients(bench):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    method = bench("published.released").RunningFisherEWC(model, strength=0.7, interval=2)
    running, squares, anchor = torch.zeros(3, 4), torch.zeros(3, 4), model.weight.detach().clone()
    importance = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(2):
        for step in range(1, 6):
            x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            task_grad = model.weight.grad.clone()
            squares = squares + task_grad**2 / 2
            if (step + 5 * method.tasks) % 2 == 0:
                running, squares = 0.1 * running + 0.9 * squares, torch.zeros(3, 4)
            method.add_penalty_grad_()
            pull = 1.4 * importance * (model.weight - anchor)
            torch.testing.assert_close(model.weight.grad, task_grad + pull)
            with torch.no_grad():
                model.weight -= 0.1 * model.weight.grad
                model.bias -= 0.1 * model.bias.grad
        method.consolidate()
        squares = torch.zeros(3, 4)
        everything = [*method._state.lists["running"]]
        lowest, highest = min(e.min() for e in everything), max(e.max() for e in everything)
        importance, anchor = (running - lowest) / (highest - lowest), model.weight.detach().clone()
        torch.testing.assert_close(method.importance["weight"], importance)
