"""How an optimizer treats its method: what it asks of it, calls around the step, CUDA graphs."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from toy_training import assert_same_state, make_model, make_task

import clext
from clext import EWC, METHODS, SI, Baseline, RWalk, optim
from clext.optim.protector import Protector

TAKEN_OVER = [Baseline, EWC, SI, RWalk]

every_kind = pytest.mark.parametrize("kind", TAKEN_OVER, ids=lambda kind: kind.name)


class Own(SI):
    """With an update that no pass knows."""

    fused = None


def steps(model, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def learn(model, method, tasks=1, optimizer=None):
    optimizer = optimizer or optim.Adam(model.parameters(), lr=0.02, method=method)
    parameter = next(model.parameters())
    for number in range(tasks):
        batches = make_task(number, parameter.dtype, parameter.device)
        steps(model, optimizer, batches)
        method.consolidate(batches)
    return optimizer


# ----------------------------------------------------------------------------- what is asked


def test_every_method_and_combination_is_a_protector():
    for kind in METHODS.values():
        assert isinstance(kind(make_model()), Protector)
    model = make_model()
    assert isinstance(EWC(model).combine(clext.Replay(model)), Protector)


def test_a_method_of_another_model_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="si was made for a model that has none of these"):
        optim.SGD(make_model().parameters(), method=SI(model))
    for given, name in (("si", "str"), (SI, "type"), (torch.optim.SGD(model.parameters()), "SGD")):
        with pytest.raises(
            TypeError, match=f"method must be a method of clext or None, got {name}"
        ):
            optim.SGD(model.parameters(), method=given)


def test_proximal_needs_a_method_that_pulls():
    model = make_model()
    for method in (None, Baseline(model), Own(model)):
        with pytest.raises(ValueError, match="proximal=True needs a method that pulls in the opt"):
            optim.SGD(model.parameters(), method=method, proximal=True)


def test_the_method_stays_what_it_is():
    optimizer = optim.SGD((model := make_model()).parameters(), method=SI(model))
    with pytest.raises(AttributeError, match="method"):
        optimizer.method = None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("released", [False, True], ids=["fused", "attached"])
def test_copies_with_their_model_and_method_go_on_alike(how, released, device):
    model = make_model().to(device)
    method = RWalk(model, variant="released") if released else SI(model)
    trio = (model, method, learn(model, method))
    twins = how(trio)
    assert twins[2].method is twins[1]
    assert twins[1].model is twins[0]
    for model, method, optimizer in (trio, twins):
        steps(model, optimizer, make_task(1, device=device))
        method.consolidate(make_task(1, device=device))
    for one, other in zip(trio, twins, strict=True):
        assert_same_state(one.state_dict(), other.state_dict())


# ----------------------------------------------------------------------------- CUDA graphs


@every_kind
def test_launch_and_after_replay_are_a_step(kind, device):
    results = []
    for apart in (False, True):
        model = make_model().to(device)
        method = kind(model)
        optimizer = learn(model, method)
        for x, y in make_task(1, device=device):
            F.cross_entropy(model(x), y).backward()
            if apart:
                optimizer.launch()
                optimizer.after_replay()
            else:
                optimizer.step()
            optimizer.zero_grad()
        results.append((model, method))
    (model, method), (other, expected) = results
    assert_same_state(model.state_dict(), other.state_dict())
    assert_same_state(method.state_dict(), expected.state_dict())


def test_launch_is_not_for_what_is_called_around_the_step():
    model = make_model()
    with pytest.raises(RuntimeError, match="of si is more than one pass; call step"):
        optim.SGD(model.parameters(), method=Own(model)).launch()


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@every_kind
@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_a_captured_step_is_replayed(kind, name, max_grad_norm, device):
    """Forward, backward and step in a graph."""
    options = {"lr": 0.02, "clear_grad": True, "max_grad_norm": max_grad_norm}
    options |= {"momentum": 0.9} if name == "SGD" else {}
    results = []
    for captured in (False, True):
        model = make_model(torch.float32).to(device)
        method = kind(model)
        stepper = getattr(optim, name)(model.parameters(), **options, method=method)
        learn(model, method, 1, stepper)
        steps_of(model, stepper, make_task(1, torch.float32, device), captured)
        results.append((model, method, stepper))
    (model, method, stepper), (other, expected, replayed) = results
    assert method.state_dict()["counters"] == expected.state_dict()["counters"]
    # Matrix products of a graph may be done by another kernel.
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    states = [each.state_dict().get("state", {}) for each in (method, expected)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stepper.penalty, replayed.penalty, rtol=1e-3, atol=1e-4)


def steps_of(model, stepper, batches, captured):
    x, y = (entry.clone() for entry in batches[0])

    def forward_and_backward():
        F.cross_entropy(model(x), y).backward()

    # Three steps make gradients, moments and workspaces, on the stream that captures.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for number in range(len(batches)):
            for place, value in zip((x, y), batches[number], strict=True):
                place.copy_(value)
            if captured and number == 3:
                with torch.cuda.graph(graph, stream=stream):
                    forward_and_backward()
                    stepper.launch()
            if captured and number >= 3:
                graph.replay()
                stepper.after_replay()
            else:
                forward_and_backward()
                stepper.step()
    torch.cuda.current_stream().wait_stream(stream)


def test_a_rate_elsewhere_is_not_captured(monkeypatch):
    """A graph would go on with what it is now."""
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.launch()  # it is where the parameters are
    before = [p.clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
    with pytest.raises(RuntimeError, match="lr is a tensor on meta, whose value .* put it on cpu"):
        optimizer.launch()
    assert all(p.equal(b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_what_cannot_be_captured_says_so(device):
    model = make_model().to(device)
    optimizer = optim.Adam(model.parameters(), method=RWalk(model))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="take a step before"), torch.cuda.graph(graph):
        optimizer.launch()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match=r"capture optimizer.launch\(\)"),
        torch.cuda.graph(graph),
    ):
        optimizer.step()
