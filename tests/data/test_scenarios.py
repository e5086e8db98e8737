"""Scenarios: the tasks that are made of a data set, and those of a user's own data sets."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import TensorDataset

import clext
from clext import Scenario
from clext.core.names import INCREMENTAL, SCENARIOS
from clext.data.datasets import Dataset, Split
from clext.data.scenario import make_scenario


def dataset(features: int = 9) -> Dataset:
    split = Split(torch.arange(4.0 * features).reshape(4, features), torch.tensor([0, 1, 2, 1]))
    return Dataset("toy", split, Split(split.inputs[:2] + 100, split.labels[:2]), 3, "a test")


class TestPermuted:
    def test_each_task_shuffles_the_pixels_of_train_and_test_alike(self):
        data, random = dataset(), torch.Generator().manual_seed(7)
        seen = [data.train.inputs]
        scenario = make_scenario("permuted", data, 3, seed=7)
        for task in scenario.tasks:
            train, test = task.train(), task.test()
            expected = data.train.inputs[:, torch.randperm(9, generator=random)]  # on the CPU
            assert train.inputs.equal(expected)
            assert train.inputs[:2].add(100).equal(test.inputs)
            assert train.labels.equal(data.train.labels)
            assert not any(train.inputs.equal(other) for other in seen)  # the first one too
            seen.append(train.inputs)
        assert scenario.num_outputs == 3
        assert [task.name for task in scenario.tasks[:2]] == ["permutation 1", "permutation 2"]

    def test_another_seed_gives_other_tasks_and_more_tasks_the_same_first_ones(self):
        def inputs(tasks: int, seed: int) -> list[torch.Tensor]:
            scenario = make_scenario("permuted", dataset(64), tasks, seed)
            return [task.train().inputs for task in scenario.tasks]

        assert not inputs(1, seed=0)[0].equal(inputs(1, seed=1)[0])
        assert all(a.equal(b) for a, b in zip(inputs(2, 0), inputs(5, 0), strict=False))


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"unknown scenario 'permutted'.*'permuted'"):
        make_scenario("permutted", dataset(), 2, seed=0)
    with pytest.raises(ValueError, match=r"'incremental' of train: 'tasks'.*'task'"):
        make_scenario("split", dataset(), 5, 0, "tasks")


def ten_classes(examples: int = 40, side: int = 4) -> Dataset:
    random = torch.Generator().manual_seed(0)

    def some(count: int) -> Split:
        return Split(
            torch.rand(count, side * side, generator=random), torch.arange(count).remainder(10)
        )

    return Dataset("toy", some(examples), some(20), 10, "a test")


class TestIncremental:
    """Which outputs a task has, which labels, and which outputs compete."""

    @pytest.mark.parametrize("name", ["permuted", "rotated"])
    @pytest.mark.parametrize("incremental", INCREMENTAL)
    def test_tasks_with_all_classes(self, name, incremental):
        data = ten_classes()
        scenario = make_scenario(name, data, 3, 0, incremental)
        start = [0, 0, 0] if incremental == "domain" else [0, 10, 20]
        assert [task.outputs for task in scenario.tasks] == [range(s, s + 10) for s in start]
        assert scenario.num_outputs == start[-1] + 10
        for task, first in zip(scenario.tasks, start, strict=True):
            assert task.train().labels.equal(data.train.labels + first)
            assert task.test().labels.equal(data.test.labels + first)

    @pytest.mark.parametrize("incremental", INCREMENTAL)
    def test_split_gives_each_task_its_classes_in_order(self, incremental):
        data = ten_classes()
        scenario = make_scenario("split", data, 5, 0, incremental)
        assert scenario.num_outputs == (2 if incremental == "domain" else 10)
        for k, task in enumerate(scenario.tasks):
            split = task.train()
            rows = [i for i, label in enumerate(data.train.labels) if label in (2 * k, 2 * k + 1)]
            assert split.inputs.equal(data.train.inputs[rows])
            first = 0 if incremental == "domain" else 2 * k
            assert split.labels.equal(data.train.labels[rows] - 2 * k + first)
            assert task.outputs == range(first, first + 2)
        assert scenario.tasks[1].name == "classes 2 to 3"

    def test_which_outputs_compete(self):
        def active(incremental: str) -> list[range | None]:
            scenario = make_scenario("split", ten_classes(), 5, 0, incremental)
            return [scenario.active(task, seen) for task, seen in ((0, 0), (0, 3), (3, 3))]

        assert active("domain") == [None, None, None]
        assert active("task") == [range(2), range(2), range(6, 8)]
        assert active("class") == [range(2), range(8), range(8)]

    @pytest.mark.parametrize("tasks", [3, 11])
    def test_classes_that_cannot_be_shared_out(self, tasks):
        with pytest.raises(ValueError, match=r"cannot make .* of the 10 classes.*\[1, 2, 5, 10\]"):
            make_scenario("split", ten_classes(), tasks, 0)


class TestRotated:
    def test_a_quarter_turn_counter_clockwise_moves_every_pixel(self):
        data = ten_classes(side=5)
        turned = make_scenario("rotated", data, 2, 0).tasks[1]
        assert turned.name == "90 degrees"
        expected = torch.rot90(data.train.inputs.view(-1, 5, 5), 1, (1, 2)).reshape(-1, 25)
        torch.testing.assert_close(turned.train().inputs, expected, atol=1e-5, rtol=0)

    def test_angles_are_even_and_the_first_task_is_as_it_is(self):
        data = ten_classes()
        tasks = make_scenario("rotated", data, 5, 0).tasks
        assert [task.name for task in tasks] == [f"{36 * k} degrees" for k in range(5)]
        assert tasks[0].train().inputs is data.train.inputs

    def test_between_pixels_it_is_bilinear(self):
        image = torch.zeros(1, 9)
        image[0, 4] = 1.0
        split = Split(image, torch.zeros(1, dtype=torch.int64))
        data = Dataset("toy", split, split, 1, "a test")
        turned = make_scenario("rotated", data, 4, 0).tasks[1].train().inputs.view(3, 3)
        beside = 1 - math.sqrt(0.5)  # how far a neighbour's source lies from the middle, per axis
        assert turned[1, 1] == pytest.approx(1, abs=1e-5)
        assert turned[0, 1] == pytest.approx(beside**2, abs=1e-5)
        assert turned[0, 0] == pytest.approx(0, abs=1e-5)

    def test_images_have_to_be_square(self):
        split = Split(torch.rand(4, 8), torch.zeros(4, dtype=torch.int64))
        with pytest.raises(ValueError, match="square images, got 8 pixels"):
            make_scenario("rotated", Dataset("toy", split, split, 1, ""), 2, 0)


def own_pair(*labels: int, shape: tuple[int, ...] = (3,)) -> tuple:
    examples = torch.rand(len(labels), *shape)
    given = torch.tensor(labels)
    return (examples, given), (examples[:2], given[:2])


class TestOwnDataSets:
    @pytest.mark.parametrize(
        ("incremental", "labels", "outputs"),
        [
            ("task", [[1, 0, 0], [4, 2, 3]], [range(2), range(2, 5)]),
            ("class", [[1, 0, 0], [3, 1, 2]], [range(2), range(1, 4)]),  # 7 comes again
            ("domain", [[7, 3, 3], [20, 7, 9]], [range(21), range(21)]),
        ],
    )
    def test_labels_become_outputs(self, incremental, labels, outputs):
        scenario = Scenario.from_datasets([own_pair(7, 3, 3), own_pair(20, 7, 9)], incremental)
        assert [task.train().labels.tolist() for task in scenario.tasks] == labels
        assert [task.outputs for task in scenario.tasks] == outputs
        if incremental == "class":
            assert scenario.active(0, 1) == range(4)

    def test_data_sets_of_torch_are_read_once_whatever_their_batches(self):
        inputs, labels = torch.rand(300, 2, 2), torch.arange(300).remainder(3)
        data = TensorDataset(inputs, labels)
        scenario = Scenario.from_datasets([(data, data)])
        assert scenario.input_shape == (2, 2)
        assert scenario.tasks[0].train().inputs.equal(inputs)
        assert scenario.tasks[0].test().labels.equal(labels)

    def test_a_domain_may_be_tested_on_a_class_that_only_another_one_was_trained_on(self):
        pairs = [own_pair(0, 1, 2), (own_pair(0, 1)[0], own_pair(2, 0)[1])]
        scenario = Scenario.from_datasets(pairs, incremental="domain")
        assert set(scenario.tasks[1].test().labels.tolist()) == {0, 2}
        with pytest.raises(ValueError, match="task 2, test data: class 2 is not among the 2 clas"):
            Scenario.from_datasets(pairs, incremental="class")

    def test_reading_leaves_the_random_state_alone(self):
        data = TensorDataset(torch.rand(5, 2), torch.zeros(5).long())
        before = torch.get_rng_state()
        Scenario.from_datasets([(data, data)])
        assert torch.get_rng_state().equal(before)

    def test_numbers_of_words_stay_integers(self):
        pair = torch.tensor([[4, 2], [0, 1]]), torch.tensor([0, 1])
        inputs = Scenario.from_datasets([(pair, pair)]).tasks[0].train().inputs
        assert inputs.dtype == torch.int64

    def test_reads_as_a_line_for_each_task(self):
        scenario = Scenario.from_datasets([own_pair(7, 3, 3), own_pair(20, 7)], "task")
        assert repr(scenario).splitlines() == [
            "Scenario 'own', task-incremental, 2 tasks:",
            "  Task 'task 1': 3 training and 2 test examples, outputs 0 to 1",
            "  Task 'task 2': 2 training and 2 test examples, outputs 2 to 3",
        ]

    def test_labels_may_be_plain_numbers(self):
        class Listed(TorchDataset):
            def __len__(self):
                return 3

            def __getitem__(self, index):
                if index >= 3:
                    raise IndexError
                return torch.full((2,), float(index)), index

        scenario = Scenario.from_datasets([(Listed(), Listed())])
        assert scenario.tasks[0].train().labels.tolist() == [0, 1, 2]

    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ([], "at least one task"),
            ([3], "task 1 must be a pair .* got int"),
            ([(own_pair(0, 1)[0],) * 3], "task 1 must be a pair .* got tuple of 3 entries"),
            ([own_pair(0, 1), ("x", "y")], "task 2, training data are str, expected a pair"),
            (
                [((np.zeros((2, 3)), np.zeros(2)),) * 2],
                "examples are ndarray, ndarray, .*torch.as_tensor",
            ),
            (
                [((torch.rand(0, 3), torch.zeros(0).long()),) * 2],
                r"training data: .* \[0, 3\], .* N > 0",
            ),
            ([((torch.rand(2, 3), torch.rand(2)),) * 2], "labels y are torch.float32"),
            (
                [((torch.rand(2, 3), torch.zeros(3).long()),) * 2],
                r"examples are torch.float32 \[2, 3\], torch.int64 \[3\]",
            ),
            ([((torch.full((2, 3), math.nan), torch.zeros(2).long()),) * 2], "NaN or infinity"),
            (
                [own_pair(0, 1), own_pair(0, 1, shape=(4,))],
                r"task 2, training data: inputs are .* \[4\] each, expected .* \[3\] .*interpolate",
            ),
            (
                [(own_pair(0, 1)[0], own_pair(0, 5)[0])],
                "task 1, test data: class 5 is not among the 2 classes of the training data",
            ),
            ([own_pair(-1, 1)], "label -1, expected numbers from 0"),
            (None, "datasets must be a list with a pair .* for each task, got nothing$"),
            (torch.rand(2, 2), r"datasets must be a list .*, got torch.float32 \[2, 2\]$"),
            ([((torch.tensor(1.0), torch.tensor([0])),) * 2], r"examples are torch.float32 \[\]"),
            (
                [((torch.rand(1, 3), ["a"]),) * 2],
                "examples are .*, list of 1 entries",
            ),
            (
                [((torch.ones(1, 3, dtype=torch.uint8), torch.tensor([0])),) * 2],
                r"task 1, training data: inputs are uint8; pass .float\(\) / 255$",
            ),
            (
                [own_pair(0), tuple((x.double(), y) for x, y in own_pair(0))],
                r"task 2, training data: inputs are torch.float64 .*, expected torch.float32",
            ),
        ],
    )
    def test_what_does_not_fit_is_named(self, pairs, message):
        with pytest.raises(ValueError, match=message):
            Scenario.from_datasets(pairs)

    @pytest.mark.parametrize(
        "given", [{"dataset": "mnist"}, {"tasks": 3}, {"incremental": "class"}, {"data_dir": "x"}]
    )
    def test_a_scenario_with_data_leaves_no_choice_of_them(self, given):
        scenario = Scenario.from_datasets([own_pair(0, 1)])
        with pytest.raises(ValueError, match="leave"):
            clext.train("baseline", scenario=scenario, progress=False, **given)

    @pytest.mark.parametrize("incremental", INCREMENTAL)
    def test_images_of_ones_own_train(self, incremental):
        pairs = [own_pair(*[0, 1, 2] * 4, shape=(1, 4, 4)) for _ in range(2)]
        scenario = Scenario.from_datasets(pairs, incremental)
        result = clext.train("ewc", scenario=scenario, epochs=1, progress=False)
        assert result.config["scenario"] == "own"
        assert result.config["incremental"] == incremental
        assert result.complete


@pytest.mark.parametrize("name", SCENARIOS)
def test_tensors_move_once_for_all_tasks(name):
    data = ten_classes()
    moved = make_scenario(name, data, 2, 0).to(torch.device("cpu"), torch.float64)
    assert len({id(task.stored_train.inputs) for task in moved.tasks}) == 1
    assert moved.tasks[1].train().inputs.dtype == torch.float64


class TestByName:
    """`Scenario.permuted` and its sisters: the tasks of `clext.train`, for any loop."""

    @pytest.mark.parametrize("name", SCENARIOS)
    def test_the_tasks_are_those_of_train(self, name):
        options = {"tasks": 2, "seed": 3, "incremental": "class"}
        given = getattr(Scenario, name)("digits", **options)
        run = {"epochs": 1, "lr": 1e-3, "progress": False}
        ours = clext.train("ewc", scenario=given, seed=3, **run)
        named = clext.train("ewc", scenario=name, dataset="digits", **options, **run)
        assert ours.title == named.title
        np.testing.assert_array_equal(ours.accuracy, named.accuracy)

    def test_loaders_give_the_examples_in_orders_of_the_seed(self):
        task = Scenario.split("digits", tasks=5, incremental="class").tasks[1]
        train, test = task.train(), task.test()
        loader = task.train_loader(100, seed=1)
        passes = [[torch.cat(part) for part in zip(*loader, strict=True)] for _ in range(2)]
        again = [torch.cat(part) for part in zip(*task.train_loader(100, seed=1), strict=True)]
        assert [len(y) for _, y in loader] == [100, 100, len(train.labels) - 200]
        assert all(a.equal(b) for a, b in zip(passes[0], again, strict=True))
        assert not passes[0][0].equal(passes[1][0])  # another order in each pass
        for inputs, labels in passes:
            assert labels.bincount().equal(train.labels.bincount())  # global labels: 2 and 3
            torch.testing.assert_close(inputs.sum(0), train.inputs.sum(0))
        in_order = next(iter(task.train_loader(50, shuffle=False)))
        assert in_order[0].equal(train.inputs[:50])
        assert torch.cat([y for _, y in task.test_loader(7)]).equal(test.labels)

    def test_a_wrong_argument_names_its_owner(self):
        with pytest.raises(ValueError, match="Scenario.rotated: tasks must be an integer >= 1"):
            Scenario.rotated("digits", tasks=0)
        with pytest.raises(ValueError, match="'incremental' of Scenario.split: 'tasks'"):
            Scenario.split("digits", incremental="tasks")
