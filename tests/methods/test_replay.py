"""Experience replay against its definition, and in every way that a method can be used."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from quick_runs import learn_all_digits, learn_beside_ewc_in_bf16, small
from rehearsal_tasks import (
    BAD_EXAMPLES,
    INPUTS,
    assert_alike,
    assert_refused_at_the_end,
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
    train,
)

from clext import Replay


@every_setting
@pytest.mark.parametrize("balance", ["sum", "tasks"])
@pytest.mark.parametrize("batch", [None, 3, 40])
def test_loss_is_that_of_the_batch_and_of_as_many_old_examples(setting, balance, batch, device):
    model = make_model(setting, device=device)
    method = Replay(model, strength=0.7, budget=9, balance=balance, batch=batch)
    run_tasks(method, setting, tasks=2)
    inputs, labels = begin(method, setting, 2)
    twin = copy.deepcopy(method._memory)
    old, old_labels = twin.sample(batch or len(inputs))
    loss = method.loss(inputs, labels)
    with method.outputs.full():
        current = obvious_loss(model, setting, 2, inputs, labels + start(setting, 2))
        replayed = obvious_loss(model, setting, 2, old, old_labels)
    expected = current + 0.7 * replayed
    if balance == "tasks":
        expected = current / 3 + 0.7 * replayed * 2 / 3
    torch.testing.assert_close(loss, expected)


@every_setting
def test_the_first_task_is_learned_as_ever(setting):
    model = make_model(setting)
    method = Replay(model)
    inputs, labels = begin(method, setting, 0)
    assert torch.equal(method.loss(inputs, labels), F.cross_entropy(model(inputs), labels))


@every_setting
def test_the_memory_has_global_labels_of_all_tasks(setting):
    method = Replay(make_model(setting), budget=100)
    run_tasks(method, setting)
    kept = sorted(zip(method._memory.inputs.tolist(), method._memory.labels.tolist(), strict=True))
    expected = []
    for number in range(3):
        inputs, labels = make_examples(setting, number)
        labels = labels + start(setting, number)
        expected += zip(inputs.tolist(), labels.tolist(), strict=True)
    assert kept == sorted(expected)


@every_setting
def test_a_step_runs_the_model_once(setting):
    method = Replay(make_model(setting))
    run_task(method, setting, 0)
    examples = begin(method, setting, 1)
    sizes = []
    method.model[0].register_forward_hook(lambda _m, _i, result: sizes.append(len(result)))
    method.loss(*examples)
    assert sizes == [2 * len(examples[0])]


@every_setting
def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(setting):
    results = []
    for stops in (False, True):
        method = Replay(make_model(setting), budget=7, policy="balanced")
        run_task(method, setting, 0)
        examples = begin(method, setting, 1)
        train(method, examples, 3)
        if stops:
            other = Replay(make_model(setting), budget=7, policy="balanced", seed=5)
            method = resumed(method, other)
        train(method, examples, 3)
        method.consolidate(own_batches(method, setting, 1))
        run_task(method, setting, 2)
        results.append(method)
    assert_alike(*results)


def test_inputs_with_gradients_are_kept_without():
    method = Replay(make_model("domain"))
    inputs, labels = make_examples("domain", 0)
    method.consolidate([(inputs.requires_grad_(), labels)])
    assert not method._memory.inputs.requires_grad


def test_a_loop_without_begin_task():
    model = make_model("domain")
    method = Replay(model, budget=6)
    for number in range(2):
        batches = own_batches(method, "domain", number)
        for batch in batches:
            method.loss(*batch).backward()
        method.consolidate(iter(batches))
    assert method._memory.size == 6


def test_beside_a_penalty_and_in_bf16():
    replay = Replay(small(), budget=50)
    result = learn_beside_ewc_in_bf16(replay)
    assert result.config["method"] == "ewc+replay"
    assert replay._memory.size == 50
    assert result.average_accuracy[-1] > 0.4


def test_replay_forgets_less_on_split_digits(device):
    replay = learn_all_digits("replay", device)
    assert replay.average_accuracy[-1] > 0.6
    assert learn_all_digits("baseline", device).average_accuracy[-1] < 0.3
    again = learn_all_digits("replay", device)
    assert again.accuracy.tolist()[-1] == replay.accuracy.tolist()[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "replay: budget must be an integer >= 1, got 0"),
        ({"budget": 2.5}, "budget must be an integer"),
        ({"budget": True}, "budget must be an integer"),
        ({"batch": 0}, "batch must be an integer >= 1"),
        ({"policy": "balance"}, "did you mean 'balanced'"),
        ({"balance": "task"}, "did you mean 'tasks'"),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Replay(make_model("domain"), **options)


BROKEN = INPUTS.index_fill(0, torch.tensor([1]), torch.nan)
BROKEN[3, 2] = torch.inf


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs the data of the task"),
        ([], "the data of the task is empty"),
        (iter([]), "the data of the task is empty"),
        ([INPUTS], "expected a pair"),
        ([(BROKEN, torch.zeros(4).long())], "inputs hold NaN or infinity; leave "),
        *(([examples], message) for examples, message in BAD_EXAMPLES),
    ],
)
def test_a_task_that_ends_with_bad_data_changes_nothing(data, message):
    method = Replay(make_model("task"), budget=5)
    run_task(method, "task", 0)
    begin(method, "task", 1)
    assert_refused_at_the_end(method, data, message)


def test_a_state_of_something_else_is_refused():
    method = Replay(make_model("domain"))
    for extra in ({}, {"memory": {}, "more": 1}, {"memory": 3}):
        with pytest.raises(ValueError, match=r"replay: .*state_dict"):
            method.load_state_dict(method.state_dict() | {"extra": extra})
