"""Which tensors of a model are protected, and how their state lies in memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clext.core.parameters import allocate_state, canonical_names, trainable_parameters
from clext.methods.parts.state import ParameterState


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    assert list(trainable_parameters(model)) == ["0.bias", "1.weight", "1.bias"]


def test_tied_parameters_are_counted_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(trainable_parameters(model)) == ["0.weight", "0.bias", "1.bias"]


def test_model_without_trainable_parameter_is_refused():
    with pytest.raises(ValueError, match="Flatten has no trainable parameter"):
        trainable_parameters(nn.Flatten())
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        trainable_parameters(frozen)


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.body.weight",
        "module._orig_mod.body.weight",
        "base_model.model.body.base_layer.weight",
        "module.body.base_model.model.base_layer.weight",
        "base_model.model.body.original_module.weight",
    ],
)
def test_wrappers_do_not_count_in_a_name(name):
    assert canonical_names({name: 1}) == {"body.weight": 1}
    both = {name: 1, "body.weight": 2}
    assert canonical_names(both) == both


def with_parameter(tensor):
    model = nn.Module()
    model.weight = nn.Parameter(tensor)
    return model


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(2, 4)[:, ::2], ValueError, r"'weight' of Module has .*strides \[4, 2\]"),
        (torch.zeros(1, 3).expand(4, 3), ValueError, r"strides \[0, 1\], expected a dense tensor"),
        (torch.zeros(2, dtype=torch.complex64), TypeError, "has dtype torch.complex64"),
        (torch.zeros(2, device="meta"), ValueError, "is on the meta device"),
        (torch.zeros(2, 2).to_sparse(), ValueError, "has layout torch.sparse_coo"),
    ],
)
def test_parameters_without_possible_state_are_refused(tensor, error, message):
    with pytest.raises(error, match=message):
        trainable_parameters(with_parameter(tensor))


def test_parameters_not_yet_initialised_are_refused():
    with pytest.raises(ValueError, match="'weight' of LazyLinear is not initialised yet"):
        trainable_parameters(nn.LazyLinear(3))


def test_parameters_on_two_devices_are_refused(device):
    if device == "cpu":
        # No second device is needed to be refused: meta tensors are never first here.
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
        expected = "'1.weight' of Sequential is on"
    else:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device=device))
        expected = "expected all trainable parameters on one device"
    with pytest.raises(ValueError, match=expected):
        trainable_parameters(model)


@pytest.fixture
def params(device):
    conv = nn.Conv2d(3, 5, 3).to(device, memory_format=torch.channels_last)
    half = nn.Linear(3, 7).to(device, torch.bfloat16)
    double = nn.Linear(4, 3).to(device, torch.float64)
    return [*conv.parameters(), *half.parameters(), *double.parameters()]


def test_state_has_the_layout_of_the_parameters_and_the_state_dtype(params):
    state = allocate_state(params)
    for entry, parameter in zip(state, params, strict=True):
        assert entry.shape == parameter.shape
        assert entry.stride() == parameter.stride()
        assert entry.device == parameter.device
        assert entry.eq(0).all()
        wide = parameter.dtype == torch.float64
        assert entry.dtype == (torch.float64 if wide else torch.float32)


def test_state_is_one_aligned_buffer_per_dtype_without_overlap(params):
    state = allocate_state(params)
    assert len({entry.untyped_storage().data_ptr() for entry in state}) == 2
    assert all(entry.data_ptr() % 64 == 0 for entry in state)
    for number, entry in enumerate(state, start=1):
        entry.fill_(number)
    assert all(bool(entry.eq(number).all()) for number, entry in enumerate(state, start=1))


def test_state_of_empty_and_0_dim_parameters():
    params = [torch.zeros(()), torch.zeros(0, 3), torch.zeros(2)]
    assert [entry.shape for entry in allocate_state(params)] == [entry.shape for entry in params]
    assert allocate_state([]) == []


# ------------------------------------------------------------------ ParameterState


def test_state_that_begins_at_the_parameters_does_not_alias_them():
    model = nn.Linear(2, 3)
    state = ParameterState(trainable_parameters(model), ("anchor", "interval_start", "path"))
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    assert torch.equal(state.view("anchor")["weight"], before)
    assert torch.equal(state.view("interval_start")["weight"], before)
    assert state.view("path")["weight"].eq(0).all()
    state.restart("interval_start")
    assert torch.equal(state.view("interval_start")["weight"], model.weight)


def test_state_knows_whether_it_still_fits():
    model = nn.Linear(2, 3)
    state = ParameterState(trainable_parameters(model), ("anchor",))
    assert state.fits(trainable_parameters(model))
    model.double()
    assert not state.fits(trainable_parameters(model))


def test_grown_parameter_keeps_the_state_of_its_leading_part():
    old = ParameterState({"w": nn.Parameter(torch.ones(2, 2))}, ("anchor", "importance"))
    old.view("importance")["w"].fill_(5.0)
    new = ParameterState({"w": nn.Parameter(torch.zeros(3, 2))}, ("anchor", "importance"))
    new.adopt(old, "ewc")
    assert new.view("importance")["w"].tolist() == [[5.0, 5.0], [5.0, 5.0], [0.0, 0.0]]
    assert new.view("anchor")["w"].tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
