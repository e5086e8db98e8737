"""LwF against its formula, in all settings; what it records, keeps and refuses."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import (
    FEATURES,
    begin,
    every_incremental,
    make_model,
    make_task,
    naive_balance,
    naive_distillation,
    naive_heads,
    rows,
    take_steps,
    train_task,
)
from quick_runs import QUICK, same, small, weights
from torch import nn
from toy_training import assert_same_state

import clext
from clext import EWC, LwF

SETTINGS = [
    {},
    {"balance": "tasks"},
    {"strength": 0.3, "temperature": 3.5},
    {"scale": "none", "balance": "tasks", "strength": 2.0},
    {"scale": "mean", "temperature": 3.0},
]


def train_naively(model, incremental, tasks, *, strength, balance, temperature, scale):
    """Returns the losses of the last task."""
    teacher, losses = None, []
    for number in range(tasks):
        (inputs, labels), _, active = make_task(number, incremental)
        active = active or range(6)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for batch in rows():
            logits = model(inputs[batch])
            loss = F.cross_entropy(logits[:, active.start : active.stop], labels[batch])
            if teacher is not None:
                old = naive_distillation(
                    logits,
                    teacher(inputs[batch]).detach(),
                    naive_heads(incremental, number),
                    temperature,
                    scale,
                )
                loss = naive_balance(loss, old, number, balance, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        teacher = copy.deepcopy(model)
    return torch.stack(losses)


@every_incremental
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("own_loop", [False, True], ids=["recorded", "in each step"])
def test_trains_like_its_formula(incremental, options, own_loop, device):
    model, naive = make_model().to(device), make_model()
    method = LwF(model, **options)
    for number in range(3):
        losses = train_task(method, number, incremental, own_loop=own_loop)
    named = ("strength", "balance", "temperature", "scale")
    expected = train_naively(
        naive, incremental, 3, **{name: getattr(method, name) for name in named}
    )
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-9)


@every_incremental
def test_the_recorded_teacher_is_the_one_that_would_run(incremental, device):
    method = LwF(make_model().to(device))
    train_task(method, 0, incremental)
    examples = begin(method, 1, incremental)
    assert [len(entry) for entry in examples] == [24, 24, 24]
    with method.outputs.full():
        torch.testing.assert_close(examples[2], method._teacher(examples[0]), rtol=1e-12, atol=0)
    method.model[0].weight.data.add_(1)  # the teacher stays where it was
    batch = [entry[:6] for entry in examples]
    torch.testing.assert_close(method.loss(*batch), method.loss(*batch[:2]), rtol=1e-12, atol=0)


def test_the_first_task_is_plain_training(device):
    (model, other) = make_model().to(device), make_model().to(device)
    losses = train_task(LwF(model), 0, "class")
    assert torch.equal(losses, train_task(clext.Baseline(other), 0, "class"))
    assert same(weights(model), weights(other))


def test_an_own_loop_with_a_growing_head_needs_nothing_but_the_loss(device):
    """The old model knows the first outputs; the others get the probability zero."""
    torch.manual_seed(2)
    model = nn.Linear(FEATURES, 2).double()
    holder = nn.Sequential(model).to(device)
    method = LwF(holder)
    (inputs, labels), _, _ = make_task(0, "domain", device)
    take_steps(method, (inputs, labels), rows())
    method.consolidate()
    teacher = holder(inputs).detach()
    grown = nn.Linear(FEATURES, 4, device=device, dtype=torch.float64)
    holder[0] = grown
    method.refresh_parameters()
    logits = holder(inputs)
    (old,) = naive_distillation(logits, teacher, [(range(4), range(2))], 2.0, "squared")
    expected = F.cross_entropy(logits, labels + 2) + old
    torch.testing.assert_close(method.loss(inputs, labels + 2), expected, rtol=1e-10, atol=0)


def test_dropout_and_batch_statistics_are_the_students_alone(device):
    layers = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6)
    model = nn.Sequential(*layers).to(device).double()
    method = LwF(model)
    train_task(method, 0, "class")
    counted = model[1].num_batches_tracked.item()
    begin(method, 1, "class", own_loop=True)
    (inputs, labels), _, _ = make_task(1, "class", device)
    method.loss(inputs, labels)
    assert model[1].num_batches_tracked.item() == counted + 1


@every_incremental
def test_bf16(incremental, device):
    method = LwF(make_model(torch.float32).to(device))
    for number in range(2):
        losses = train_task(method, number, incremental, autocast=True)
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())


def test_holds_more_of_the_old_task_than_nothing_does():
    def remembered(method):
        result = clext.train(
            method,
            model=small(),
            scenario="split",
            incremental="task",
            lr=1e-2,
            **{**QUICK, "epochs": 5},
        )
        return result.accuracy[1, 0]

    assert remembered("lwf") > remembered("baseline") + 0.02


@every_incremental
def test_combines_with_a_regulariser(incremental):
    """The loss is that of LwF, the penalty that of the regulariser."""
    model, other = make_model(), make_model()
    both, alone = EWC(model, strength=0.0).combine(LwF(model)), LwF(other)
    for number in range(3):
        train_task(both, number, incremental)
        train_task(alone, number, incremental)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    assert both.label == "ewc+lwf"
    assert all(bool(entry.any()) for entry in both.importance.values())


# ------------------------------------------------------------------ state


@pytest.mark.parametrize("combined", [False, True])
@every_incremental
def test_goes_on_after_a_resume_as_if_it_had_not_stopped(incremental, combined, device):
    def make():
        model = make_model().to(device)
        return EWC(model).combine(LwF(model)) if combined else LwF(model)

    method = make()
    for number in range(2):
        train_task(method, number, incremental)
    buffer = io.BytesIO()
    torch.save((method.model.state_dict(), method.state_dict()), buffer)
    buffer.seek(0)
    resumed = make()
    states = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    losses = [train_task(each, 2, incremental) for each in (method, resumed)]
    assert torch.equal(*losses)
    assert same(weights(method.model), weights(resumed.model))
    assert_same_state(resumed.state_dict(), method.state_dict())


def test_a_state_of_the_first_task_forgets_the_teacher():
    method = LwF(make_model())
    start = method.state_dict()
    train_task(method, 0, "task")
    method.load_state_dict(start)
    assert_same_state(method.state_dict(), start)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pupil": {}}, "holds 'pupil', expected 'teacher' or nothing"),
        ({"teacher": {}}, r"\['teacher'\] holds nothing"),
        (
            {"teacher": {"names": ["0.bias"], "values": {"0.bias": torch.zeros(9)}}},
            r"\['teacher'\]\['0.bias'\] is torch.float32",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(extra, message):
    method = LwF(make_model())
    train_task(method, 0, "task")
    before = method.state_dict()
    other = LwF(make_model(), strength=3.0).state_dict()
    with pytest.raises(ValueError, match=message):
        method.load_state_dict({**other, "extra": extra})
    assert_same_state(method.state_dict(), before)


def test_the_teacher_moves_with_the_method(device):
    method = LwF(make_model())
    train_task(method, 0, "task")
    method.model.to(device)
    method.to(device)
    train_task(method, 1, "task")


def test_memory_is_one_model_however_many_tasks():
    method = LwF(make_model())
    sizes = []
    for number in range(3):
        train_task(method, number, "class")
        values = method._teacher.state_dict()["values"].values()
        sizes.append(sum(value.numel() for value in values))
    assert sizes == [sum(p.numel() for p in method.model.parameters())] * 3


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0},
            "lwf: temperature must be a finite number >= 0.0001 and <= 10000, got 0",
        ),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": 1e-30}, "temperature must be"),
        ({"temperature": 2e4}, "temperature must be"),
        ({"temperature": math.inf}, "temperature must be"),
        ({"temperature": "2"}, "temperature must be"),
        ({"scale": "square"}, "option 'scale' of lwf: 'square'; did you mean 'squared'"),
        ({"balance": "task"}, "did you mean 'tasks'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LwF(make_model(), **options)


def test_examples_that_the_model_cannot_take_change_nothing():
    method = LwF(make_model())
    train_task(method, 0, "task")
    before = method.state_dict()
    with pytest.raises(RuntimeError):
        method.begin_task(
            (torch.rand(3, FEATURES + 1).double(), torch.zeros(3).long()),
            block=range(2, 4),
            active=range(2, 4),
        )
    assert_same_state(method.state_dict(), before)
    assert method.outputs.active == range(2)
    train_task(method, 1, "task")
