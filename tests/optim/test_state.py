"""An optimizer's state and options: saved, loaded from torch.optim and into it, copied, refused."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from optim_cases import CASES, PLAIN, assert_same_parameters, loss_of, train, twins
from torch import nn

import clext
from clext import optim

every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("case", PLAIN)


def saved(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ----------------------------------------------------------------------------- state dicts


@every_case
@pytest.mark.parametrize("way", ["torch to clext", "clext to torch", "clext to clext"])
def test_state_moves_between_the_namesakes(case, way, device):
    mine, theirs, options = CASES[case]
    first = theirs if way.startswith("torch") else mine
    second = theirs if way.endswith("torch") else mine
    model, expected = twins(device)
    uninterrupted = theirs(expected.parameters(), **options)
    train(expected, uninterrupted, range(20))

    before = first(model.parameters(), **options)
    train(model, before, range(8))
    after = second(model.parameters(), lr=1.0)
    after.load_state_dict(saved(before.state_dict()))
    assert after.param_groups[0]["lr"] == options["lr"]
    train(model, after, range(8, 20))
    assert_same_parameters(model, expected)


@every_kind
def test_the_second_head_has_no_state_before_it_has_a_gradient(case, device):
    """And it is not in the state dict, so that torch would begin it anew as well."""
    (model,) = twins(device, count=1)
    optimizer = CASES[case][0](model.parameters(), **CASES[case][2])
    train(model, optimizer, range(3))
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters())) - 2


@every_kind
def test_same_names_as_in_torch(case, device):
    mine, theirs, options = CASES[case]
    states = []
    for kind, model in zip((mine, theirs), twins(device), strict=True):
        optimizer = kind(model.parameters(), **options)
        train(model, optimizer, range(3))
        states.append(optimizer.state_dict())
    own, other = states
    assert own["param_groups"] == other["param_groups"]
    assert own["state"].keys() == other["state"].keys()
    for number, entries in other["state"].items():
        added = {"step"} if case.startswith("sgd") else set()
        assert own["state"][number].keys() == entries.keys() | added
        for name, value in entries.items():
            torch.testing.assert_close(
                own["state"][number][name].cpu(), value.cpu(), check_dtype=False
            )


@every_kind
def test_loading_copies_and_keeps_float32(case, device):
    mine, _, options = CASES[case]
    model, other = twins(device, torch.bfloat16)
    one = mine(model.parameters(), **options)
    train(model, one, range(5))
    two = mine(other.parameters(), **options)
    two.load_state_dict(one.state_dict())
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    for (a, b), _ in zip(pairs, one.state, strict=False):
        assert one.state[a].keys() == two.state[b].keys()
        for key, entry in one.state[a].items():
            assert entry.dtype == torch.float32
            assert torch.equal(two.state[b][key], entry)
            assert two.state[b][key].data_ptr() != entry.data_ptr()
            assert key == "step" or entry.stride() == a.stride()


def test_a_state_in_another_layout_is_laid_out_anew(device):
    model, other = twins(device)
    for each in (model, other):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.02)
        train(each, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    for entries in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            flipped = entries[key].transpose(0, -1).contiguous().transpose(0, -1)
            entries[key] = flipped
    mine = optim.Adam(model.parameters())
    mine.load_state_dict(state)
    for each in ((model, mine), (other, optimizer)):
        train(*each, range(3, 10))
    assert_same_parameters(model, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"][0].update(lr=-1.0), "Adam: lr must be a finite number >= 0"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True is not supported"),
        (
            lambda s: s["param_groups"].append({"params": []}),
            "different number of parameter groups",
        ),
        (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
        (lambda s: s["state"][1].update(exp_avg=torch.zeros(4)), r"'exp_avg' has shape \[4\]"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    model, other = twins("cpu")
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(3, 6))
    train(other, torch.optim.Adam(other.parameters(), lr=0.02), range(6))
    assert_same_parameters(model, other)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, "what state_dict.. returns, .* got NoneType"),
        ({}, "got dict of nothing"),
        ({"state": {}}, "got dict of 'state'"),
        ({"state": {0: 3}, "param_groups": [{"params": [0]}]}, "got dict of 'state', 'param_gr"),
    ],
    ids=str,
)
def test_what_is_no_state_dict(state, message):
    optimizer = optim.Adam([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=f"Adam: load_state_dict .*{message}"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("library", [optim, torch.optim], ids=["clext", "torch"])
def test_a_state_dict_of_another_class(library):
    theta = torch.nn.Parameter(torch.ones(3))
    sgd, adam = library.SGD([theta]).state_dict(), library.AdamW([theta]).state_dict()
    with pytest.raises(ValueError, match="Adam: the state dict has no option 'betas'"):
        optim.Adam([theta]).load_state_dict(sgd)
    with pytest.raises(ValueError, match="SGD: the state dict has no option 'momentum'"):
        optim.SGD([theta]).load_state_dict(adam)
    optim.Adam([theta]).load_state_dict(adam)


@every_kind
@pytest.mark.parametrize("how", ["clear", "new dict"])
def test_forgetting_the_state_by_hand(case, how, device):
    pairs = []
    for kind, model in zip(CASES[case][:2], twins(device), strict=True):
        optimizer = kind(model.parameters(), **CASES[case][2])
        train(model, optimizer, range(5))
        if how == "clear":
            optimizer.state.clear()
        else:
            optimizer.state = type(optimizer.state)(dict)
        train(model, optimizer, range(5, 15))
        pairs.append(model)
    assert_same_parameters(*pairs)


# ----------------------------------------------------------------------------- copies, hooks


@every_kind
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(case, how, device):
    (model,) = twins(device, count=1)
    optimizer = CASES[case][0](model.parameters(), **CASES[case][2], clear_grad=True)
    train(model, optimizer, range(5))
    twin_model, twin = how((model, optimizer))
    assert twin.param_groups[0]["params"][0] is next(twin_model.parameters())
    for each in ((model, optimizer), (twin_model, twin)):
        train(*each, range(5, 10))
    for mine, theirs in zip(model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert twin.clear_grad


def test_a_pickle_is_as_large_as_what_is_in_it():
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(8)))
    optimizer = optim.Adam(model.parameters())
    model(torch.ones(1, 40)).sum().backward()
    optimizer.step()
    assert len(pickle.dumps(optimizer)) < 4 * 1.2 * len(pickle.dumps(model))  # with gradients


def test_an_optimizer_with_a_method_is_not_copied():
    (model,) = twins("cpu", count=1)
    optimizer = optim.Adam(model.parameters(), method=clext.SI(model))
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="save its state_dict.. and the method's"):
            how(optimizer)


def test_hooks(device):
    (model,) = twins(device, count=1)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    train(model, optimizer, range(2))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"] * 2 + [0]


def test_repr_names_the_options():
    (model,) = twins("cpu", count=1)
    assert "lr: 0.25" in repr(optim.AdamW(model.parameters(), lr=0.25))


# ----------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (optim.SGD, {"lr": -0.1}, "SGD: lr must be a finite number >= 0, got -0.1"),
        (optim.SGD, {"lr": float("nan")}, "SGD: lr must be"),
        (optim.SGD, {"lr": "fast"}, "SGD: lr must be"),
        (optim.SGD, {"lr": torch.ones(2)}, "float tensor of one element"),
        (optim.SGD, {"lr": torch.tensor(1)}, "float tensor of one element"),
        (optim.SGD, {"lr": torch.tensor(-1.0)}, "SGD: lr must be a finite number >= 0"),
        (optim.SGD, {"momentum": -1}, "SGD: momentum must be"),
        (optim.SGD, {"weight_decay": -1}, "SGD: weight_decay must be"),
        (optim.SGD, {"dampening": float("inf")}, "SGD: dampening must be a finite number"),
        (optim.SGD, {"nesterov": True}, "nesterov needs momentum > 0 and dampening 0"),
        (optim.SGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "and dampening 0.1"),
        (optim.SGD, {"differentiable": True}, "use torch.optim.SGD with"),
        (optim.SGD, {"maximize": 1}, "SGD: maximize must be True or False"),
        (optim.Adam, {"betas": (1.0, 0.9)}, r"Adam: betas\[0\] must be"),
        (optim.Adam, {"betas": (0.9, -0.1)}, r"Adam: betas\[1\] must be"),
        (optim.Adam, {"betas": 0.9}, "Adam: betas must be two numbers"),
        (optim.Adam, {"eps": -1e-8}, "Adam: eps must be"),
        (optim.Adam, {"amsgrad": True}, "use torch.optim.Adam with"),
        (optim.Adam, {"differentiable": True}, "use torch.optim.Adam with"),
        (optim.AdamW, {"amsgrad": True}, "use torch.optim.AdamW with"),
        (optim.AdamW, {"weight_decay": -0.5}, "AdamW: weight_decay must be"),
        (optim.AdamW, {"clear_grad": None}, "AdamW: clear_grad must be True or False"),
        (optim.AdamW, {"proximal": True}, "proximal=True needs a method"),
    ],
    ids=str,
)
def test_options_out_of_range(kind, options, message):
    theta = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        kind([theta], **options)


def test_options_of_groups_are_checked_too():
    theta, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match="lr must be"):
        optim.Adam([{"params": [theta], "lr": -1.0}])
    optimizer = optim.Adam([theta])
    with pytest.raises(ValueError, match="eps must be"):
        optimizer.add_param_group({"params": [other], "eps": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("kind", "option", "value", "message"),
    [
        (optim.Adam, "lr", "fast", "lr must be a finite number >= 0, got 'fast'"),
        (optim.Adam, "lr", torch.ones(2), "float tensor of one element"),
        (optim.Adam, "betas", (0.9,), "betas must be two numbers"),
        (optim.Adam, "eps", None, "eps must be a finite number"),
        (optim.Adam, "amsgrad", True, "amsgrad=True is not supported"),
        (optim.SGD, "momentum", -1.0, "momentum must be"),
        (optim.SGD, "nesterov", True, "nesterov needs momentum"),
    ],
    ids=str,
)
def test_options_set_later_are_checked_before_anything_moves(kind, option, value, message):
    one, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = kind([{"params": [one]}, {"params": [other]}], lr=0.1)
    optimizer.param_groups[1][option] = value
    one.grad, other.grad = torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert one.eq(1).all()
    assert not optimizer.state


def test_flags_set_later_are_checked_too():
    theta = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([theta])
    optimizer.proximal = "often"
    with pytest.raises(ValueError, match="SGD: proximal must be True or False, got 'often'"):
        optimizer.step()
    with pytest.raises(AttributeError, match="method"):
        optimizer.method = None


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group():
    theta = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="SGD: a parameter is in group 0 twice"):
        optim.SGD([theta, theta])


def test_a_group_without_parameters():
    optimizer = optim.Adam([{"params": []}])
    optimizer.step()
    assert optimizer.penalty.item() == 0


def test_tensors_do_where_torch_takes_them():
    theta = torch.nn.Parameter(torch.ones(3))
    betas = (torch.tensor(0.5), torch.tensor([0.75]))
    group = optim.Adam([theta], betas=betas, weight_decay=torch.tensor(0.5)).param_groups[0]
    assert group["betas"] == (0.5, 0.75)
    assert group["weight_decay"] == 0.5


@every_kind
def test_flags_of_torch_are_taken(case, device):
    (model,) = twins(device, count=1)
    flags = {"foreach": True, "fused": True} | ({} if "sgd" in case else {"capturable": True})
    optimizer = CASES[case][0](model.parameters(), **flags)
    train(model, optimizer, range(2))
    assert optimizer.param_groups[0]["fused"] is True


def test_parameters_no_state_can_be_kept_for(device):
    for theta, message in (
        (torch.zeros(2, dtype=torch.complex64, device=device), "has dtype torch.complex64"),
        (torch.zeros(2, 4, device=device)[:, ::2], r"strides \[4, 2\], expected a dense"),
    ):
        parameter = torch.nn.Parameter(theta)
        optimizer = optim.Adam([parameter])
        parameter.grad = torch.zeros_like(theta)
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.step()


def test_steps_of_one_model_with_parameters_of_several_dtypes(device):
    models = twins(device, torch.float32)
    for kind, model in zip(CASES["adam"][:2], models, strict=True):
        model.heads.double()
        optimizer = kind(model.parameters(), lr=0.02)
        for step in range(5):
            hidden = model.body(torch.tanh(model.conv(loss_input(step, model))).flatten(1))
            model.heads[0](hidden.double()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(*models, torch.float32)


def loss_input(step, model):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 2, 4, 4, generator=generator)
    return x.to(next(model.parameters()).device)


def test_step_without_any_gradient(device):
    (model,) = twins(device, count=1)
    optimizer = optim.Adam(model.parameters())
    assert optimizer.step() is None
    assert not optimizer.state
    assert optimizer.penalty.device.type == device
    loss_of(model, 0).backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters())) - 2
