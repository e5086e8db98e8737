"""Joint training: what is trained on, and what it says where it cannot be."""

from __future__ import annotations

import pytest
import torch
from incremental_tasks import (
    TASKS,
    batches_for,
    begin,
    every_setting,
    make_examples,
    make_model,
    obvious_loss,
    run_task,
    start,
)

from clext import Joint


@every_setting
def test_a_task_is_trained_on_the_examples_of_all_tasks_so_far(setting, device):
    method = Joint(make_model(setting, device=device))
    expected, labels = [], []
    for number in range(TASKS):
        own = make_examples(setting, number, device=device)
        expected.append(own[0])
        labels.append(own[1] + start(setting, number))
        examples = begin(method, setting, number)
        assert examples[0].equal(torch.cat(expected))
        assert examples[1].equal(torch.cat(labels))
        obvious = obvious_loss(method.model, setting, number, *examples)
        torch.testing.assert_close(method.loss(*examples), obvious)
        method.consolidate(batches_for(method, setting, number))


def test_examples_are_kept_by_reference():
    method = Joint(make_model("domain"))
    examples = make_examples("domain", 0)
    returned = method.begin_task(examples)
    assert returned[0].data_ptr() == examples[0].data_ptr()
    method.consolidate()
    method.begin_task(make_examples("domain", 1))
    assert method._examples[0][0].data_ptr() == examples[0].data_ptr()


def test_a_task_that_is_begun_again_counts_once():
    method = Joint(make_model("domain"))
    run_task(method, "domain", 0)
    for number in (1, 2):
        examples = begin(method, "domain", number)
    expected = torch.cat([make_examples("domain", number)[0] for number in (0, 2)])
    assert examples[0].equal(expected)


def test_a_loop_that_does_not_give_the_examples_is_told():
    method = Joint(make_model("domain"))
    batch = make_examples("domain", 0)
    message = r"joint has not seen the examples of this task: call begin_task\(\(inputs, labels\)\)"
    with pytest.raises(RuntimeError, match=message):
        method.loss(*batch)
    run_task(method, "domain", 0)
    with pytest.raises(RuntimeError, match=message):  # the second task has not begun
        method.loss(*batch)


def test_examples_of_another_shape_are_refused_and_nothing_is_changed():
    method = Joint(make_model("domain"))
    run_task(method, "domain", 0)
    inputs, labels = make_examples("domain", 1)
    with pytest.raises(
        ValueError, match=r"joint: inputs are .* \[3\] each, .* of the tasks before"
    ):
        method.begin_task((inputs[:, :3], labels))
    assert list(method._examples) == [0]
