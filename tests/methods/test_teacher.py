"""A model as it was: `clext.methods.parts.teacher`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods.parts.heads import Outputs
from clext.methods.parts.teacher import Snapshot, refuse_broken


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


def test_returns_what_the_model_returned_in_eval_mode(model, inputs):
    before, snapshot = copy.deepcopy(model).eval(), Snapshot(model)
    moved(model).train()
    counted = model[1].num_batches_tracked.clone()
    outputs = snapshot(inputs)
    assert torch.equal(outputs, before(inputs))
    assert not outputs.requires_grad
    assert all(module.training for module in model.modules())
    assert torch.equal(model[1].num_batches_tracked, counted)


def test_leaves_the_model_as_it_is(model, inputs):
    snapshot = Snapshot(model)
    state = {name: value.clone() for name, value in moved(model).state_dict().items()}
    model[2].eval()
    snapshot(inputs)
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_head_that_has_grown_since_has_its_old_width(model, inputs):
    before, snapshot = copy.deepcopy(model).eval(), Snapshot(model)
    model[3] = nn.Linear(5, 8, device=inputs.device)
    model.append(nn.Identity())
    assert torch.equal(snapshot(inputs), before(inputs))
    assert model(inputs).shape == (7, 8)


def test_the_selection_of_outputs_applies(model, inputs):
    outputs, snapshot = Outputs(model), Snapshot(model)
    expected = snapshot(inputs)
    outputs.select(range(1, 3))
    assert torch.equal(snapshot(inputs), expected[:, 1:3])
    with outputs.full():
        assert torch.equal(snapshot(inputs), expected)


def test_tied_parameters_stay_tied(device):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to(device)
    model[1].weight = model[0].weight
    before, snapshot = copy.deepcopy(model), Snapshot(model)
    with torch.no_grad():
        model[0].weight.mul_(3)
    inputs = torch.randn(2, 4, device=device)
    assert torch.equal(snapshot(inputs), before(inputs))


def test_many_inputs_are_recorded_in_batches(model, device):
    sizes = []
    model.register_forward_hook(lambda _module, args, _out: sizes.append(len(args[0])))
    inputs = torch.randn(2300, 4, device=device)
    recorded = Snapshot(model).record(inputs)
    assert sizes == [1000, 1000, 300]
    torch.testing.assert_close(recorded, copy.deepcopy(model).eval()(inputs))


def test_a_part_that_is_gone_is_named(model, inputs):
    snapshot = Snapshot(model)
    del model[3]
    with pytest.raises(RuntimeError, match=r"has '3.bias', which the model has no more"):
        snapshot(inputs)


def test_state_round_trip(model, inputs):
    snapshot = Snapshot(model)
    expected, state = snapshot(inputs), snapshot.state_dict()
    model[3] = nn.Linear(5, 8, device=inputs.device)
    loaded = Snapshot.load("here", moved(model), state)
    for value in state["values"].values():
        value.zero_()  # a copy
    assert torch.equal(loaded(inputs), expected)
    assert torch.equal(snapshot(inputs), expected)


def with_value(state, name, value):
    return {**state, "values": {**state["values"], name: value}}


def without(state, name):
    return {**state, "values": {key: v for key, v in state["values"].items() if key != name}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: None, r"^here holds NoneType, expected names and values$"),
        (lambda _: {}, "^here holds nothing, expected names and values$"),
        (lambda s: s["values"], "^here holds 0.weight, .*, expected names and values$"),
        (lambda s: {**s, "names": 3}, "^here has names and values of int and dict, expected"),
        (lambda _: {"names": [], "values": {}}, "holds nothing; expected the model's parameters"),
        (lambda s: with_value(s, "9.bias", s["values"]["3.bias"]), "'9.bias', which the model has"),
        (lambda s: with_value(s, "3.bias", 3), r"here\['3.bias'\] is int, expected a dense tensor"),
        (lambda s: with_value(s, "3.bias", torch.zeros(4)), r"\[4\], expected the .*32 \[3\]"),
        (lambda s: with_value(s, "3.bias", torch.zeros(3, 1)), r"\[3, 1\], expected the torch"),
        (lambda s: with_value(s, "3.bias", torch.zeros(3).long()), "is torch.int64 "),
        (lambda s: with_value(s, "3.bias", torch.full((3,), torch.nan)), "holds NaN or infinity"),
        (lambda s: without(s, "0.bias"), "^here: '0.bias' is missing among its values, expected"),
        (lambda s: {**s, "names": s["names"][1:]}, "^here: there are others among its values"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        Snapshot.load("here", model, change(Snapshot(model).state_dict()))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("0.weight", torch.nan, "^icarl: the model's parameter '0.weight' holds NaN or infinity, "),
        ("3.bias", -torch.inf, "parameter '3.bias' holds"),
        ("1.running_mean", torch.nan, "buffer '1.running_mean' holds"),
        ("1.running_var", torch.inf, "buffer '1.running_var' holds"),
    ],
)
def test_a_broken_model_is_no_teacher(model, name, value, message):
    refuse_broken("icarl", model)
    model.state_dict()[name][0] = value
    with pytest.raises(ValueError, match=message):
        refuse_broken("icarl", model)


def test_a_mask_among_the_buffers_is_not_broken(model):
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    refuse_broken("lwf", model)
    loaded = Snapshot.load("here", model, Snapshot(model).state_dict())
    assert bool(loaded.state_dict()["values"]["mask"].isneginf().all())


@pytest.mark.parametrize("kind", [clext.LwF, clext.DGR, clext.ICaRL])
@pytest.mark.parametrize("combined", [False, True])
def test_a_task_that_has_broken_the_model_does_not_end(kind, combined):
    model = nn.Linear(4, 3)
    method = kind(model)
    whole = clext.SI(model).combine(method) if combined else method
    batch = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    whole.begin_task(batch)
    whole.loss(*batch)
    before = whole.state_dict()
    with torch.no_grad():
        model.bias[1] = torch.nan
    with pytest.raises(ValueError, match=f"^{kind.name}: the model's parameter 'bias' holds NaN"):
        whole.consolidate([batch])
    assert_same_state(whole.state_dict(), before)
