"""Runs of the methods that keep something: what they remember of the digits, the same each time."""

from __future__ import annotations

import pytest
import torch
from quick_runs import QUICK, learn_all_digits, learn_beside_ewc_in_bf16, small
from torch import nn

import clext

# Average accuracy after five tasks of two digits each, told apart from all before; without a
# method it is below 0.3.
AT_LEAST = {"replay": 0.6, "derpp": 0.35, "er-ace": 0.65, "icarl": 0.7, "joint": 0.85}


@pytest.mark.parametrize("name", AT_LEAST)
def test_digits_are_remembered_the_same_each_time(name, device):
    result = learn_all_digits(name, device)
    assert result.average_accuracy[-1] > AT_LEAST[name]
    assert learn_all_digits("baseline", device).average_accuracy[-1] < 0.3
    assert learn_all_digits(name, device).curve == result.curve


def remembered(method, incremental, epochs, **options):
    settings = {**QUICK, "scenario": "split", "incremental": incremental, "epochs": epochs}
    return clext.train(method, model=small(), lr=1e-2, **settings, **options).accuracy[1, 0]


def test_lwf_holds_more_of_the_old_task_than_nothing_does():
    assert remembered("lwf", "task", 5) > remembered("baseline", "task", 5) + 0.02


def test_dgr_remembers_classes_that_are_gone():
    assert remembered("baseline", "class", 15) < 0.1
    assert remembered("dgr", "class", 15, hidden=(128,), latent=16) > 0.6


@pytest.mark.parametrize("name", ["gem", "agem"])
@pytest.mark.parametrize("incremental", ["domain", "task", "class"])
def test_projection_changes_the_later_tasks_alone(name, incremental):
    options = {**QUICK, "scenario": "split", "incremental": incremental, "lr": 1e-2, "epochs": 4}
    run = clext.train(name, per_task=16, model=small(), **options)
    alone = clext.train("baseline", model=small(), **options)
    assert run.config["strength"] is None
    assert run.curve[:4] == alone.curve[:4]
    assert run.curve != alone.curve
    assert name == "agem" or run.accuracy[1, 0] > alone.accuracy[1, 0]


@pytest.mark.parametrize(("kind", "least"), [(clext.Replay, 0.4), (clext.ICaRL, 0.5)])
def test_beside_a_penalty_and_in_bf16(kind, least):
    result = learn_beside_ewc_in_bf16(kind(small(), budget=50))
    assert result.config["method"] == f"ewc+{kind.name}"
    assert result.average_accuracy[-1] > least


@pytest.mark.parametrize("name", ["gem", "agem"])
def test_projection_in_bf16(name):
    result = clext.train(name, model=small(), precision="bf16", per_task=16, **QUICK)
    assert result.complete


def test_a_run_counts_icarls_answers_by_its_exemplars():
    torch.manual_seed(1)
    x, y = torch.rand(40, 6), torch.arange(40) % 4
    tasks = [(x[y // 2 == k], y[y // 2 == k]) for k in range(2)]
    scenario = clext.Scenario.from_datasets([(task, task) for task in tasks], incremental="class")
    method = clext.ICaRL(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), budget=8)
    result = clext.train(method, scenario=scenario, epochs=1, progress=False, device="cpu")
    for place, (inputs, labels) in enumerate(tasks):
        answers = method.predict(inputs, active=range(4)).argmax(dim=1)
        assert result.accuracy[1, place] == pytest.approx(answers.eq(labels).double().mean().item())
