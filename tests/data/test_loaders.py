"""Tasks of a user's own data loaders: which outputs, which labels, batch by batch."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from clext import Scenario
from clext.core.supervision import Supervision

MODEL = torch.nn.Linear(3, 4)


def read(batch):
    return Supervision(MODEL).inputs_and_labels(batch)


def loader(labels, shuffle=False):
    return DataLoader(TensorDataset(torch.ones(len(labels), 3), torch.tensor(labels)), 2, shuffle)


def two(first, second, classes, incremental) -> Scenario:
    pairs = [(loader(first), loader(first)), (loader(second), loader(second))]
    return Scenario.from_loaders(pairs, classes, incremental)


def labels_of(batches) -> list[int]:
    return torch.cat([labels for _, labels in batches]).tolist()


class TestLabels:
    def test_of_tasks_with_a_head_each(self):
        scenario = two([7, 5, 7], [0, 1, 1], [[5, 7], [0, 1]], "task")
        assert [task.outputs for task in scenario.tasks] == [range(2), range(2, 4)]
        assert scenario.num_outputs == 4
        second = scenario.tasks[1]
        assert labels_of(scenario.tasks[0].test_batches(read)) == [1, 0, 1]
        assert labels_of(second.test_batches(read)) == [2, 3, 3]
        assert labels_of(second.train_batches(read, second.outputs.start)) == [0, 1, 1]
        assert scenario.active(1, 1) == range(2, 4)

    def test_of_classes_that_come_one_after_the_other(self):
        scenario = two([30, 10], [20, 10], [[30, 10], [10, 20]], "class")
        assert [task.classes for task in scenario.tasks] == [[0, 1], [0, 2]]
        assert labels_of(scenario.tasks[1].test_batches(read)) == [2, 0]

    def test_of_domains_are_outputs_and_batches_are_left_alone(self):
        given = [{"pixels": torch.ones(2, 3), "kind": torch.tensor([0, 4])}]
        scenario = Scenario.from_loaders([(given, given)] * 2, [range(5)] * 2)
        assert [task.outputs for task in scenario.tasks] == [range(5)] * 2
        (batch,) = scenario.tasks[1].test_batches(read)
        assert batch["kind"].equal(given[0]["kind"])

    def test_of_mappings_go_into_pairs(self):
        given = [{"x": torch.ones(2, 3), "labels": torch.tensor([9, 8])}]
        scenario = Scenario.from_loaders([(given, given)], [[8, 9]], "class")
        ((inputs, labels),) = scenario.tasks[0].test_batches(read)
        assert inputs["x"].equal(given[0]["x"])
        assert labels.tolist() == [1, 0]


def test_batches_go_to_the_device():
    scenario = two([0, 1], [2, 3], [[0, 1], [2, 3]], "class")
    moved = scenario.to(torch.device("meta"), torch.float32)
    assert moved.tasks[0].device.type == "meta"
    assert moved.incremental == "class"


def test_a_look_at_the_test_data_draws_nothing_from_the_global_state():
    pair = (loader([0, 1, 1]), loader([0, 1, 1], shuffle=True))
    scenario = Scenario.from_loaders([pair], [[0, 1]])
    before = torch.get_rng_state()
    list(scenario.tasks[0].test_batches(read))
    assert torch.get_rng_state().equal(before)


class TestDoor:
    @pytest.mark.parametrize(
        ("pairs", "classes", "message"),
        [
            ([(1, 2)], [[0]], "task 1: expected loaders.*got int"),
            ([(iter([]), [])], [[0]], "give their batches anew .*got list_iterator; pass a Data"),
            ([([], [], [])], [[0]], r"task 1 must be a pair \(training loader, test loader\)"),
            ([([], [])], [], "labels of each of the 1 tasks.*got"),
            ([([], [])], [[]], "labels of each of the 1 tasks.*got"),
            ([([], [])], [[-1, 0]], "task 1: label -1, expected numbers from 0"),
        ],
    )
    def test_what_are_no_loaders(self, pairs, classes, message):
        with pytest.raises(ValueError, match=f"Scenario.from_loaders: .*{message}"):
            Scenario.from_loaders(pairs, classes)

    def test_a_label_of_another_task(self):
        scenario = two([0, 1], [2, 4], [[0, 1], [2, 3]], "class")
        with pytest.raises(ValueError, match=r"task 2: a batch has label 4, .* classes \[2, 3\]"):
            list(scenario.tasks[1].test_batches(read))

    def test_labels_of_no_class(self):
        given = [(torch.ones(2, 3), torch.ones(2))]
        scenario = Scenario.from_loaders([(given, given)], [[0, 1]], "class")
        with pytest.raises(ValueError, match=r"torch.float32 \[2\], expected integers \[N\]"):
            list(scenario.tasks[0].test_batches(read))

    def test_a_loader_without_batches(self):
        scenario = Scenario.from_loaders([([], [])], [[0, 1]])
        with pytest.raises(ValueError, match="task 1: a loader gave no batch"):
            list(scenario.tasks[0].test_batches(read))

    def test_a_model_by_name_has_nothing_to_be_made_for(self):
        with pytest.raises(ValueError, match="no example is known .*pass model, a torch.nn.Mod"):
            two([0], [1], [[0], [1]], "class").input_shape  # noqa: B018
