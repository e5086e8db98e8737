"""LwF against its formula, in all settings, and what it records."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import (
    BATCH,
    FEATURES,
    TASKS,
    batches_for,
    begin,
    every_setting,
    make_examples,
    make_model,
    obvious_balance,
    obvious_distillation,
    old_heads,
    ranges,
    run_task,
    train,
)
from torch import nn

from clext import LwF

SETTINGS = [
    {},
    {"balance": "tasks"},
    {"strength": 0.3, "temperature": 3.5},
    {"scale": "none", "balance": "tasks", "strength": 2.0},
    {"scale": "mean", "temperature": 3.0},
]


def train_by_the_formula(model, setting, *, strength, balance, temperature, scale):
    """Returns the losses of the last task."""
    teacher, losses = None, []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in range(TASKS):
        inputs, labels = make_examples(setting, number)
        active, losses = ranges(setting, number)[1] or range(2), []
        for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
            logits = model(x)
            loss = F.cross_entropy(logits[:, active.start : active.stop], y)
            if teacher is not None:
                known, heads = teacher(x).detach(), old_heads(setting, number)
                old = obvious_distillation(logits, known, heads, temperature, scale)
                loss = obvious_balance(loss, old, number, balance, strength)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        teacher = copy.deepcopy(model)
    return torch.stack(losses)


@every_setting
@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("own_loop", [False, True], ids=["recorded", "in each step"])
def test_trains_like_its_formula(setting, options, own_loop, device):
    model, obvious = make_model(setting, device=device), make_model(setting)
    method = LwF(model, **options)
    for number in range(TASKS):
        examples = begin(method, setting, number)
        losses = train(method, examples[:2] if own_loop else examples)
        method.consolidate(batches_for(method, setting, number))
    named = {
        name: getattr(method, name) for name in ("strength", "balance", "temperature", "scale")
    }
    expected = train_by_the_formula(obvious, setting, **named)
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(model.parameters(), obvious.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-9)


def test_what_is_recorded_is_what_the_teacher_would_say(device):
    method = LwF(make_model(device=device))
    run_task(method, "class", 0)
    expected = method.model(make_examples("class", 1, device=device)[0])
    examples = begin(method, "class", 1)
    torch.testing.assert_close(examples[2], expected, rtol=1e-12, atol=0)


def test_an_own_loop_with_a_growing_head_needs_nothing_but_the_loss(device):
    """The old model knows the first outputs; the others get the probability zero."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(FEATURES, 2)).to(device).double()
    method = LwF(model)
    inputs, labels = make_examples("domain", 0, device=device)
    method.loss(inputs, labels)
    method.consolidate()
    teacher = model(inputs).detach()
    model[0] = nn.Linear(FEATURES, 4, device=device, dtype=torch.float64)
    logits = model(inputs)
    (old,) = obvious_distillation(logits, teacher, [(range(4), range(2))], 2.0, "squared")
    expected = F.cross_entropy(logits, labels + 2) + old
    torch.testing.assert_close(method.loss(inputs, labels + 2), expected, rtol=1e-10, atol=0)
    model[0] = nn.Linear(FEATURES, 1, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match="has 1 outputs, and 2 .*: a head may grow but not shrink"):
        method.loss(inputs, 0 * labels)


def test_dropout_and_batch_statistics_are_the_students_alone(device):
    layers = nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6)
    model = nn.Sequential(*layers).to(device).double()
    method = LwF(model)
    run_task(method, "class", 0)
    counted = model[1].num_batches_tracked.item()
    inputs, labels, _ = begin(method, "class", 1)
    method.loss(inputs, labels)
    assert model[1].num_batches_tracked.item() == counted + 1


@every_setting
def test_bf16(setting, device):
    method = LwF(make_model(setting, torch.float32, device))
    for number in range(2):
        losses = run_task(method, setting, number, autocast=True)
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())
