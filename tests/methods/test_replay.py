"""Experience replay against its definition."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import (
    TASKS,
    batches_for,
    begin,
    every_setting,
    make_examples,
    make_model,
    obvious_balance,
    obvious_loss,
    run_task,
    run_tasks,
    start,
)

from clext import Replay


@every_setting
@pytest.mark.parametrize("balance", ["sum", "mean", "tasks"])
@pytest.mark.parametrize("batch", [None, 3, 40])
def test_loss_is_that_of_the_batch_and_of_as_many_old_examples(setting, balance, batch, device):
    model = make_model(setting, device=device)
    method = Replay(model, strength=0.7, budget=13, balance=balance, batch=batch)
    run_tasks(method, setting, tasks=2)
    inputs, labels = begin(method, setting, 2)
    old, old_labels = copy.deepcopy(method._buffer).sample(batch or len(inputs))
    assert len(old) == (batch or 12)
    current = obvious_loss(model, setting, 2, inputs, labels + start(setting, 2))
    replayed = obvious_loss(model, setting, 2, old, old_labels)
    expected = obvious_balance(current, [replayed], 2, balance, 0.7)
    torch.testing.assert_close(method.loss(inputs, labels), expected)


@every_setting
def test_the_first_task_is_learned_as_ever(setting):
    method = Replay(make_model(setting))
    inputs, labels = begin(method, setting, 0)
    assert torch.equal(method.loss(inputs, labels), F.cross_entropy(method.heads(inputs), labels))


@every_setting
def test_the_buffer_has_global_labels_of_all_tasks(setting):
    method = Replay(make_model(setting), budget=100)
    run_tasks(method, setting)
    tasks = [make_examples(setting, number) for number in range(TASKS)]
    inputs, labels, _ = method._buffer.rows
    assert inputs.equal(torch.cat([x for x, _ in tasks]))
    assert labels.equal(torch.cat([y + start(setting, k) for k, (_, y) in enumerate(tasks)]))


@every_setting
def test_a_step_runs_the_model_once(setting):
    """So that layers that look at the whole batch see old and new examples."""
    method = Replay(make_model(setting))
    run_task(method, setting, 0)
    examples = begin(method, setting, 1)
    sizes = []
    method.model[0].register_forward_hook(lambda _m, _i, result: sizes.append(len(result)))
    method.loss(*examples)
    assert sizes == [2 * len(examples[0])]


def test_a_loop_without_begin_task():
    method = Replay(make_model("domain"), budget=6)
    for number in range(2):
        batches = batches_for(method, "domain", number)
        for batch in batches:
            method.loss(*batch).backward()
        method.consolidate(iter(batches))
    assert len(method._buffer) == 6


@every_setting
def test_following_the_stream_each_batch_is_replayed_after_its_step(setting):
    """Of the current task too; with "mean" it is one cross entropy over both."""
    model = make_model(setting)
    method = Replay(model, policy="stream", balance="mean", budget=100)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = 0
    for number in range(TASKS):
        inputs, labels = begin(method, setting, number)
        for i, (x, y) in enumerate(zip(inputs.split(4), labels.split(4), strict=True)):
            assert len(method._buffer) == seen - (4 if i else 0), "the last is in it later"
            method._take_in()
            assert len(method._buffer) == seen
            expected = obvious_loss(model, setting, number, x, y + start(setting, number))
            if seen:
                old, old_labels = copy.deepcopy(method._buffer).sample(len(x))
                replayed = obvious_loss(model, setting, number, old, old_labels)
                expected = (expected + replayed) / 2
            optimizer.zero_grad()
            loss = method.loss(x, y)
            torch.testing.assert_close(loss, expected)
            loss.backward()
            optimizer.step()
            seen += len(x)
        method.consolidate()
        assert len(method._buffer) == seen
