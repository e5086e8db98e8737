"""An optimizer's state and options: saved, loaded from torch.optim and into it, copied, refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from optim_cases import CASES, PLAIN, assert_same_parameters, make_pair, train, twins
from torch import nn
from toy_training import make_model, make_task

import clext
from clext import optim

every_kind = pytest.mark.parametrize("case", PLAIN)


def saved(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ----------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("case", CASES)
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
def test_same_names_as_in_torch(case, device):
    """And none for the second head before it has a gradient."""
    pairs = make_pair(case, device)
    for model, optimizer in pairs:
        train(model, optimizer, range(3))
    own, other = (optimizer.state_dict() for _, optimizer in pairs)
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
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert one.state.get(a, {}).keys() == two.state.get(b, {}).keys()
        for key, entry in one.state.get(a, {}).items():
            assert entry.dtype == torch.float32
            assert torch.equal(two.state[b][key], entry)
            assert two.state[b][key].data_ptr() != entry.data_ptr()
            assert key == "step" or entry.stride() == a.stride()


def test_a_state_in_another_layout_is_laid_out_anew(device):
    (model, mine), (other, theirs) = make_pair("adam", device)
    train(model, torch.optim.Adam(model.parameters(), lr=0.02), range(3))
    train(other, theirs, range(3))
    state = copy.deepcopy(theirs.state_dict())
    for entries in state["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entries[key] = entries[key].transpose(0, -1).contiguous().transpose(0, -1)
    mine.load_state_dict(state)
    for each in ((model, mine), (other, theirs)):
        train(*each, range(3, 10))
    assert_same_parameters(model, other)


def test_a_state_that_a_hook_has_changed_is_the_one_that_is_taken(device):
    (model, mine), _ = make_pair("adam", device, torch.bfloat16)
    train(model, mine, range(2))
    state, value = mine.state_dict(), 1 + 2.0**-20  # which bfloat16 has not

    def change(_optimizer, loaded):
        entries = {**loaded["state"][1], "exp_avg": torch.full((3,), value)}
        return {**loaded, "state": {**loaded["state"], 1: entries}}

    mine.register_load_state_dict_pre_hook(change)
    mine.load_state_dict(state)
    assert mine.state[model.conv.bias]["exp_avg"].eq(value).all()


def of_parameter_1(**entries):
    return lambda state: state["state"][1].update(entries)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"][0].update(lr=-1.0), "Adam: lr must be a finite number >= 0"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True is not supported"),
        (lambda s: s["param_groups"].append({"params": []}), "different number of parameter group"),
        (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
        (lambda s: s["param_groups"][0].pop("betas"), "has no option 'betas', so it is of another"),
        (lambda s: s["state"][1].pop("exp_avg_sq"), "KeyError.'exp_avg_sq'."),
        (lambda s: s["state"].update({1: 3}), "'int' object"),
        (lambda s: s.clear(), "KeyError"),
        (of_parameter_1(exp_avg=torch.zeros(4)), r"'exp_avg' is \[4\], expected a tensor \[3\]"),
        (of_parameter_1(exp_avg_sq=b"zeros"), "'exp_avg_sq' is bytes, expected a tensor"),
        (of_parameter_1(exp_avg_sq=[0.0, 0.0, 0.0]), "'exp_avg_sq' is list, expected a tensor"),
        (of_parameter_1(exp_avg_sq=torch.zeros(3, device="meta")), "meta"),
        (of_parameter_1(exp_avg_sq=torch.zeros(3).to_sparse()), "[Ss]parse"),
        (of_parameter_1(step=-3), "step must be a finite number >= 0, got -3"),
        (of_parameter_1(step=torch.tensor(float("nan"))), "step must be a finite number >= 0"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    pairs = make_pair("adam", "cpu")
    for model, optimizer in pairs:
        train(model, optimizer, range(3))
    optimizer = pairs[0][1]
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=rf"Adam: the state dict does not fit: .*{message}"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    for model, each in pairs:
        train(model, each, range(3, 6))
    assert_same_parameters(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("library", [optim, torch.optim], ids=["clext", "torch"])
def test_a_state_dict_of_another_class(library):
    theta = torch.nn.Parameter(torch.ones(3))
    sgd, adam = library.SGD([theta]).state_dict(), library.AdamW([theta]).state_dict()
    with pytest.raises(ValueError, match="no option 'betas', so it is of another optimizer"):
        optim.Adam([theta]).load_state_dict(sgd)
    with pytest.raises(ValueError, match="no option 'momentum', so it is of another optimizer"):
        optim.SGD([theta]).load_state_dict(adam)
    optim.Adam([theta]).load_state_dict(adam)


# ----------------------------------------------------------------------------- copies, hooks


@every_kind
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(case, how, device):
    (model,) = twins(device, count=1)
    options = {**CASES[case][2], "clear_grad": True, "max_grad_norm": 0.3}
    optimizer = CASES[case][0](model.parameters(), **options)
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


# ----------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (optim.SGD, {"lr": -0.1}, "SGD: lr must be a finite number >= 0, got -0.1"),
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
        (optim.SGD, {"max_grad_norm": 0}, "SGD: max_grad_norm must be"),
        (optim.Adam, {"max_grad_norm": float("nan")}, "Adam: max_grad_norm must be"),
        (optim.Adam, {"betas": (1.0, 0.9)}, r"Adam: betas\[0\] must be"),
        (optim.Adam, {"betas": (0.9, -0.1)}, r"Adam: betas\[1\] must be"),
        (optim.Adam, {"betas": 0.9}, "Adam: betas must be two numbers"),
        (optim.Adam, {"eps": -1e-8}, "Adam: eps must be"),
        (optim.AdamW, {"amsgrad": True}, "use torch.optim.AdamW with"),
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
    ("option", "value"), [("lr", -1.0), ("lr", "fast"), ("eps", None), ("betas", (0.9,))], ids=str
)
def test_a_bad_value_that_is_set_later_is_an_error_of_the_step(option, value):
    theta = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.Adam([theta], lr=0.1)
    optimizer.param_groups[0][option] = value
    theta.grad = torch.ones(3)
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert theta.eq(1).all()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_twice_in_a_group():
    theta = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="SGD: a parameter is in group 0 twice"):
        optim.SGD([theta, theta])


def test_a_group_without_parameters():
    optimizer = optim.Adam([{"params": []}], max_grad_norm=1.0)
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
    assert "fused: True" in repr(optimizer)


def test_parameters_no_state_can_be_kept_for(device):
    for theta, message in (
        (torch.zeros(2, dtype=torch.complex64, device=device), "'w' has dtype complex64"),
        (torch.zeros(2, 4, device=device)[:, ::2], r"strides \[4, 2\], expected a dense"),
    ):
        parameter = torch.nn.Parameter(theta)
        optimizer = optim.Adam([("w", parameter)])
        parameter.grad = torch.zeros_like(theta)
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                optimizer.step()


# ----------------------------------------------------------------------------- beside a method


def beside(method, model):
    """An optimizer that does the method's work, whatever that is."""
    return optim.Adam(model.parameters(), lr=0.01, method=method)


def steps_with(method, optimizer, number, steps):
    for x, y in make_task(number)[:steps]:
        method.loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("kind", [clext.SI, clext.EWC, clext.Replay, clext.AGEM])
@pytest.mark.parametrize("order", ["method first", "optimizer first", "without the method"])
def test_a_state_that_goes_on_beside_another_method_than_it_was_saved_with(kind, order):
    model = make_model()
    method = kind(model)
    optimizer = beside(method, model)
    steps_with(method, optimizer, 0, 5)
    method.consolidate(make_task(0))
    steps_with(method, optimizer, 1, 3)
    of_method, of_optimizer = saved(method.state_dict()), saved(optimizer.state_dict())

    resumed = kind(model)
    if order == "method first":
        resumed.load_state_dict(of_method)
    after = beside(resumed, model)
    after.load_state_dict(of_optimizer)
    if order == "optimizer first":
        resumed.load_state_dict(of_method)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps_with(resumed, after, 1, 2)
    told = [str(entry.message) for entry in caught]
    if order == "without the method":
        (message,) = told  # once, not at each step
        assert f"saved beside {resumed.name} after 1 tasks and 3 steps" in message
    else:
        assert told == []


def test_a_state_is_loaded_without_a_word_of_the_method_into_what_has_none():
    model = make_model()
    method = clext.SI(model)
    optimizer = beside(method, model)
    steps_with(method, optimizer, 0, 5)
    with_method = optimizer.state_dict()
    without = {key: entry for key, entry in with_method.items() if key != "method"}
    fresh = clext.SI(make_model())
    plain = torch.optim.Adam(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain.load_state_dict(with_method)
        plain.step()
        older = beside(fresh, fresh.model)
        older.load_state_dict(without)  # as it was saved before there was such an entry
        steps_with(fresh, older, 0, 1)
