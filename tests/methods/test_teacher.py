"""A model as it was: `clext.methods.parts.teacher`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods.parts.teacher import Teacher, check_teacher


@pytest.fixture
def model(device):
    torch.manual_seed(1)
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 3)
    return nn.Sequential(*layers).to(device)


@pytest.fixture
def inputs(device):
    return torch.randn(7, 4).to(device)


def moved(model):
    with torch.no_grad():
        for entry in (*model.parameters(), model[1].running_mean):
            entry.add_(1)
    return model


def test_says_what_the_model_said_in_eval_mode_and_leaves_it_as_it_is(model, inputs):
    before, teacher = copy.deepcopy(model).eval(), Teacher(model)
    moved(model)[2].eval()
    state = copy.deepcopy(model.state_dict())
    outputs = teacher(inputs)
    assert torch.equal(outputs, before(inputs))
    assert not outputs.requires_grad
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert_same_state(model.state_dict(), state)


def test_a_head_that_has_grown_since_has_its_old_width(model, inputs):
    before, teacher = copy.deepcopy(model).eval(), Teacher(model)
    model[3] = nn.Linear(5, 8, device=inputs.device)
    model.append(nn.Identity())
    assert torch.equal(teacher(inputs), before(inputs))


def test_tied_parameters_stay_tied(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    model[1].weight = model[0].weight
    before, teacher = copy.deepcopy(model), Teacher(model)
    with torch.no_grad():
        model[0].weight.mul_(3)
    inputs = torch.randn(2, 4, device=device)
    assert torch.equal(teacher(inputs), before(inputs))


def test_many_inputs_are_recorded_in_batches(model, device):
    sizes = []
    model.register_forward_hook(lambda _module, args, _out: sizes.append(len(args[0])))
    inputs = torch.randn(2300, 4, device=device)
    recorded = Teacher(model).record(inputs)
    assert sizes == [1000, 1000, 300]
    torch.testing.assert_close(recorded, copy.deepcopy(model).eval()(inputs))


def test_its_state_is_a_copy_and_is_of_that_model(model, inputs):
    teacher = Teacher(model)
    expected, state = teacher(inputs), teacher.state_dict()
    model[3] = nn.Linear(5, 8, device=inputs.device)
    loaded = Teacher.load(moved(model), state)
    for value in state["values"].values():
        value.zero_()
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(teacher(inputs), expected)
    for shape in ((9,), (3, 1)):
        state["values"]["3.bias"] = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"'3.bias' is .*, expected at most the \[8\] of the"):
            Teacher.load(model, state)


@pytest.mark.parametrize(
    ("name", "value"),
    [("0.weight", torch.nan), ("3.bias", -torch.inf), ("1.running_mean", torch.nan)],
)
def test_a_broken_model_is_none(model, name, value):
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    check_teacher("icarl", model)
    model.state_dict()[name][0] = value
    with pytest.raises(ValueError, match=f"^icarl: '{name}' of the model holds NaN or infinity"):
        check_teacher("icarl", model)


@pytest.mark.parametrize("kind", [clext.LwF, clext.DGR, clext.ICaRL])
def test_a_task_that_has_broken_the_model_does_not_end(kind):
    model = nn.Linear(4, 3)
    method = clext.SI(model).combine(kind(model))
    batch = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    method.begin_task(batch)
    method.loss(*batch).backward()
    method.add_penalty_grad_()
    before = method.state_dict()
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(ValueError, match="holds NaN"):
        method.consolidate([batch])
    assert_same_state(method.state_dict(), before)
