"""Joint training: what is trained on, and what it says where it cannot be."""

from __future__ import annotations

import pytest
import torch
from quick_runs import learn_all_digits, learn_beside_ewc_in_bf16, small
from rehearsal_tasks import (
    BAD_EXAMPLES,
    INPUTS,
    assert_alike,
    assert_refused_at_the_beginning,
    begin,
    every_setting,
    make_examples,
    make_model,
    obvious_loss,
    own_batches,
    resumed,
    run_task,
    run_tasks,
    start,
)

from clext import Joint


@every_setting
def test_a_task_is_trained_on_the_examples_of_all_tasks_so_far(setting, device):
    method = Joint(make_model(setting, device=device))
    expected, labels = [], []
    for number in range(3):
        own = make_examples(setting, number, device=device)
        expected.append(own[0])
        labels.append(own[1] + start(setting, number))
        examples = begin(method, setting, number)
        assert examples[0].equal(torch.cat(expected))
        assert examples[1].equal(torch.cat(labels))
        loss = method.loss(*examples)
        with method.outputs.full():
            obvious = obvious_loss(method.model, setting, number, *examples)
        torch.testing.assert_close(loss, obvious)
        method.consolidate(own_batches(method, setting, number))


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


@every_setting
def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(setting):
    results = []
    for stops in (False, True):
        method = Joint(make_model(setting))
        run_tasks(method, setting, tasks=2)
        if stops:
            method = resumed(method, Joint(make_model(setting)))
        run_task(method, setting, 2)
        results.append(method)
    assert_alike(*results)


def test_a_loaded_state_is_copied():
    method = Joint(make_model("domain"))
    run_task(method, "domain", 0)
    state = method.state_dict()
    method.load_state_dict(state)
    state["extra"]["examples"][0][0].zero_()
    assert method._examples[0][0].equal(make_examples("domain", 0)[0])


def test_a_loop_that_does_not_give_the_examples_is_told():
    method = Joint(make_model("domain"))
    batch = make_examples("domain", 0)
    message = r"joint has not seen the examples of this task: call begin_task\(\(inputs, labels\)\)"
    with pytest.raises(RuntimeError, match=message):
        method.loss(*batch)
    method.begin_task()
    with pytest.raises(RuntimeError, match=message):
        method.loss(*batch)
    run_task(method, "domain", 0)
    with pytest.raises(RuntimeError, match=message):  # the second task has not begun
        method.loss(*batch)


def test_joint_is_the_upper_bound_on_split_digits(device):
    assert learn_all_digits("joint", device).average_accuracy[-1] > 0.85


def test_beside_a_penalty_and_in_bf16():
    result = learn_beside_ewc_in_bf16(Joint(small()), incremental="task")
    assert result.config["method"] == "ewc+joint"
    assert result.average_accuracy[-1] > 0.8


@pytest.mark.parametrize(("examples", "message"), BAD_EXAMPLES)
def test_a_task_that_begins_with_bad_examples_changes_nothing(examples, message):
    assert_refused_at_the_beginning(Joint(make_model("task")), examples, message)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "holds nothing, expected examples"),
        ({"examples": {0: INPUTS}}, "task 0 has no inputs and labels"),
        ({"examples": {0: [INPUTS, 3]}}, "task 0 has no inputs and labels"),
        ({"examples": {0: [INPUTS, torch.zeros(4)]}}, r"labels torch.float32 \[4\], expected"),
        ({"examples": {"a": [INPUTS, torch.zeros(4).long()]}}, "task 'a'"),
    ],
)
def test_a_state_of_something_else_is_refused(extra, message):
    method = Joint(make_model("domain"))
    with pytest.raises(ValueError, match=f"joint: state_dict.*{message}"):
        method.load_state_dict(method.state_dict() | {"extra": extra})
