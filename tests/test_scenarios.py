"""Scenarios: the tasks that are made of a data set."""

import pytest
import torch

from clext.data import Dataset, Split
from clext.scenarios import make_scenario


def dataset(features: int = 9) -> Dataset:
    split = Split(torch.arange(4.0 * features).reshape(4, features), torch.tensor([0, 1, 2, 1]))
    return Dataset("toy", split, Split(split.inputs[:2] + 100, split.labels[:2]), 3, "a test")


def test_each_task_shuffles_the_pixels_of_train_and_test_alike():
    data = dataset()
    for task in make_scenario("permuted", data, 3, seed=1).tasks:
        train, test = task.train(), task.test()
        assert train.inputs[:2].add(100).equal(test.inputs)
        assert train.inputs.sort(dim=1).values.equal(data.train.inputs)
        assert train.labels.equal(data.train.labels)


def test_all_tasks_differ_and_the_first_is_permuted_too():
    data = dataset()
    seen = [data.train.inputs]
    for task in make_scenario("permuted", data, 4, seed=0).tasks:
        inputs = task.train().inputs
        assert not any(inputs.equal(other) for other in seen)
        seen.append(inputs)


def test_the_permutations_are_those_of_a_cpu_generator_with_the_seed():
    data, random = dataset(), torch.Generator().manual_seed(7)
    for task in make_scenario("permuted", data, 2, seed=7).tasks:
        expected = data.train.inputs[:, torch.randperm(9, generator=random)]
        assert task.train().inputs.equal(expected)


def test_another_seed_gives_other_tasks_and_more_tasks_the_same_first_ones():
    data = dataset(64)

    def inputs(tasks: int, seed: int) -> list[torch.Tensor]:
        scenario = make_scenario("permuted", data, tasks, seed)
        return [task.train().inputs for task in scenario.tasks]

    assert not inputs(1, seed=0)[0].equal(inputs(1, seed=1)[0])
    assert all(a.equal(b) for a, b in zip(inputs(2, 0), inputs(5, 0), strict=False))


def test_outputs_and_names():
    scenario = make_scenario("permuted", dataset(), 2, seed=0)
    assert scenario.num_outputs == 3
    assert [task.name for task in scenario.tasks] == ["permutation 1", "permutation 2"]


def test_unknown_scenario_suggests_the_nearest():
    with pytest.raises(ValueError, match=r"unknown scenario 'permutted'.*'permuted'"):
        make_scenario("permutted", dataset(), 2, seed=0)
