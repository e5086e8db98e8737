"""Chance: what always giving the same answer would be worth."""

import numpy as np
import pytest
import torch
from quick_runs import QUICK, small

import clext
from clext.training.chance import chance_levels


def scenario(labels: list[list[int]], incremental: str) -> clext.Scenario:
    tasks = [(torch.zeros(len(y), 3), torch.tensor(y)) for y in labels]
    return clext.Scenario.from_datasets(zip(tasks, tasks, strict=True), incremental)


@pytest.mark.parametrize(
    ("incremental", "labels", "expected"),
    [
        # The most frequent class differs: one head can only bet on one of them.
        ("domain", [[0, 0, 0, 1], [1, 1, 1, 0]], [0.75, 0.5]),
        ("task", [[0, 0, 0, 1], [3, 3, 3, 2]], [0.75, 0.75]),
        ("class", [[0, 1], [2, 3], [4, 5]], [1 / 2, 1 / 4, 1 / 6]),
        ("class", [[0, 1], [1, 2]], [1 / 2, 1 / 2]),  # a class that comes again
    ],
)
def test_is_the_best_that_one_answer_gives(incremental, labels, expected):
    assert chance_levels(scenario(labels, incremental)) == pytest.approx(expected)


def test_a_run_records_it_and_the_accuracy_on_each_task_after_each_epoch():
    options = {**QUICK, "scenario": "split", "incremental": "class", "lr": 1e-2}
    result = clext.train("baseline", model=small(), evaluate_every=1, **options)
    per_epoch = max(step["step"] for step in result.steps) // 2
    ends = [step["accuracy"] for step in result.steps if step["step"] % per_epoch == 0]
    assert result.task_curve == ends
    assert [len(row) for row in result.task_curve] == [1, 1, 2, 2]
    assert result.curve == [np.mean(row) for row in result.task_curve]
    assert result.task_curve[1::2] == [[*row[: k + 1]] for k, row in enumerate(result.accuracy)]
    assert result.chance == pytest.approx([0.2, 0.1], abs=0.02)
