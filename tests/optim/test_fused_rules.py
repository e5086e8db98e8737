"""Which methods an optimizer's pass takes over, what they keep then, and graphs of the pass."""

from __future__ import annotations

import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from toy_training import assert_same_state, make_model, make_task, train_steps, train_tasks

from clext import EWC, MAS, METHODS, SCP, SI, Baseline, RWalk, optim

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*was not called in this task:UserWarning"),
]


TAKEN_OVER = [kind for kind in METHODS.values() if kind.fused_state is not None]


@pytest.fixture(params=METHODS)
def kind(request):
    return METHODS[request.param]


def steps(model, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def learn(model, method, tasks=1, optimizer=None):
    optimizer = optimizer or optim.Adam(model.parameters(), lr=0.02, method=method)
    device = next(model.parameters()).device
    for number in range(tasks):
        batches = make_task(number, next(model.parameters()).dtype, device)
        steps(model, optimizer, batches)
        method.consolidate(batches)
    return optimizer


# ----------------------------------------------------------------------------- what is kept


def test_what_the_pass_works_on():
    pull = ("anchor", "importance")
    assert Baseline.fused_state == ()
    assert {kind.fused_state for kind in (EWC, MAS, SCP)} == {pull}
    assert SI.fused_state == (*pull, "path")
    assert RWalk.fused_state == (*pull, "path", "fisher")


@pytest.mark.parametrize("kind", [SI, RWalk])
def test_previous_is_given_back(kind, device):
    model = make_model().to(device)
    method = kind(model)
    assert "previous" in method._state.lists
    buffer = StorageWeakRef(method._state.lists["previous"][0].untyped_storage())
    optimizer = optim.Adam(model.parameters(), method=method)
    gc.collect()
    assert "previous" not in method._state.lists
    assert buffer.expired()
    learn(model, method, 2, optimizer)
    assert "previous" not in method.state_dict()["state"]
    model[0].weight.data = model[0].weight.data.clone()
    model.add_module("new", torch.nn.Linear(2, 2).to(device).double())
    method.refresh_parameters()
    assert "previous" not in method._state.lists


@pytest.mark.parametrize("kind", TAKEN_OVER)
def test_the_loop_of_the_other_way_is_refused(kind):
    model = make_model()
    method = kind(model)
    train_tasks(model, method, tasks=1)
    optim.SGD(model.parameters(), method=method)
    for name in ("update", "add_penalty_grad_"):
        with pytest.raises(RuntimeError, match=rf"{kind.name}: {name}\(\) is not to be called"):
            getattr(method, name)()
    assert method.penalty().item() == 0  # may still be looked at


def test_the_penalty_in_the_loss_of_an_attached_method_is_reported(recwarn):
    model = make_model()
    method = SI(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, method=method)
    method.penalty().item()
    assert not recwarn
    with pytest.warns(UserWarning, match=r"penalty\(\) of si is in the loss.*leave it out"):
        method.penalty().backward()
    optimizer.step()


@pytest.mark.parametrize("before", ["fused", "apart"])
@pytest.mark.parametrize("after", ["fused", "apart"])
def test_state_goes_from_one_way_to_the_other(kind, before, after, device):
    """In the middle of a task."""
    model, other = make_model().to(device), make_model().to(device)
    method, resumed, batches = kind(model), kind(other), make_task(1, device=device)

    def train(model, method, optimizer, way, batches):
        run = steps if way == "fused" else lambda m, o, b: train_steps(m, method, o, b)
        run(model, optimizer, batches)

    def make(model, method, way):
        if way == "fused":
            return optim.Adam(model.parameters(), lr=0.02, method=method)
        return torch.optim.Adam(model.parameters(), lr=0.02)

    train_tasks(model, method, tasks=1)
    optimizer = make(model, method, before)
    train(model, method, optimizer, before, batches[:6])
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, method)], buffer)
    buffer.seek(0)
    resumed_optimizer = make(other, resumed, after)
    states = torch.load(buffer, weights_only=True)
    for part, state in zip((other, resumed_optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    for each, way in (
        ((model, method, optimizer), before),
        ((other, resumed, resumed_optimizer), after),
    ):
        train(*each, way, batches[6:])
        each[1].consolidate(batches)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    for name, entry in resumed.importance.items():
        torch.testing.assert_close(entry, method.importance[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("drop", ["path", "fisher"])
def test_other_state_is_still_required(drop):
    method = RWalk(make_model())
    state = method.state_dict()
    del state["state"][drop]
    with pytest.raises(ValueError, match=f"missing {drop}"):
        method.load_state_dict(state)


@pytest.mark.parametrize("kind", [SI, RWalk])
def test_a_task_without_a_step_of_the_optimizer_is_reported(kind):
    model = make_model()
    method = kind(model)
    optim.Adam(model.parameters(), method=method)
    with pytest.warns(UserWarning, match="with the optimizer that was given this"):
        method.consolidate()


def test_the_first_task_costs_nothing(device):
    """No anchor is read before there is an importance; the path is followed from the start."""
    for kind, keys in ((EWC, ()), (SI, SI.fused_state)):
        model = make_model().to(device)
        method = kind(model)
        optimizer = learn_one_step(model, method)
        assert protection(optimizer) == keys
        method.consolidate(make_task(0, device=device))
        learn_one_step(model, method, optimizer)
        assert protection(optimizer) == kind.fused_state


def learn_one_step(model, method, optimizer=None):
    optimizer = optimizer or optim.Adam(model.parameters(), method=method)
    steps(model, optimizer, make_task(0, device=next(model.parameters()).device)[:1])
    return optimizer


def protection(optimizer):
    from clext.optim import plans

    return plans._protection(optimizer).keys


# ----------------------------------------------------------------------------- methods of others


class Watched(SI):
    """A method with an update of its own."""

    def update(self):
        self.seen = [p.grad.clone() for p in self.model.parameters()]
        super().update()


class Mixed:
    def penalty(self):
        return 2 * super().penalty()


class Doubled(Mixed, EWC):
    pass


class Faster(SI):
    """Says that the pass still does its work."""

    fused_state = SI.fused_state

    def update(self):
        super().update()


class Renamed(SI):
    name = "renamed"


def test_overriding_what_the_pass_replaces_takes_a_method_out_of_it():
    assert Watched.fused_state is None
    assert Doubled.fused_state is None
    assert Faster.fused_state == Renamed.fused_state == SI.fused_state


class OnlyPenalty(EWC):
    """Of which the gradient is nowhere written down."""

    def penalty(self):
        return 2 * super().penalty()


@pytest.mark.parametrize("kind", [OnlyPenalty, Doubled])
@pytest.mark.parametrize("way", ["fused", "apart"])
def test_a_penalty_of_their_own_is_what_pulls(kind, way, device):
    results = []
    for each, strength in ((kind, 2.0), (EWC, 4.0)):
        model = make_model().to(device)
        method = each(model, strength=strength, anchors="all")
        if way == "fused":
            learn(model, method, 3)
        else:
            train_tasks(model, method, tasks=3)
        results.append(model)
    for mine, theirs in zip(*(model.parameters() for model in results), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


class Silent(SI):
    def add_penalty_grad_(self):
        super().add_penalty_grad_()


def test_a_penalty_that_is_not_returned():
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1, method=Silent(model))
    before = model[0].weight.detach().clone()
    with pytest.raises(TypeError, match=r"of si must return the penalty, .* got NoneType"):
        learn_one_step(model, None, optimizer)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("clear_grad", [False, True])
def test_their_functions_are_called_around_the_step(clear_grad, device):
    results = []
    for kind in (Watched, SI):
        model = make_model().to(device)
        method = kind(model, strength=2.0)
        optimizer = optim.Adam(model.parameters(), lr=0.02, method=method, clear_grad=clear_grad)
        learn(model, method, 2, optimizer)
        results.append((model, method, optimizer.penalty))
    (model, method, value), (other, expected, its_value) = results
    assert any(bool(entry.any()) for entry in method.seen)
    assert "previous" in method._state.lists
    assert value.item() == pytest.approx(its_value.item(), rel=1e-9)
    for name, entry in method.importance.items():
        torch.testing.assert_close(entry, expected.importance[name], rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
        assert not clear_grad or mine.grad is None or mine.grad.eq(0).all()


def test_a_scaler_unscales_before_them(device):
    model = make_model(torch.float32).to(device)
    method = Watched(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, method=method)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    x, y = make_task(0, torch.float32, device)[0]
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    scaler.scale(F.cross_entropy(model(x), y)).backward()
    scaler.step(optimizer)
    for mine, theirs in zip(method.seen, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("keys", [("anchor", "importance", "pth"), ("path",), ("anchor",)])
def test_a_fused_state_that_no_pass_works_on(keys):
    class Own(SI):
        fused_state = keys

    with pytest.raises(ValueError, match=r"si: fused_state is \(.*\), expected one of \(\), "):
        optim.SGD((model := make_model()).parameters(), method=Own(model))


def test_launch_is_not_for_them():
    model = make_model()
    with pytest.raises(RuntimeError, match="has an update of its own"):
        optim.SGD(model.parameters(), method=Watched(model)).launch()


def test_a_method_of_another_model_is_refused():
    method = SI(make_model())
    with pytest.raises(ValueError, match="si was made for a model that has none of these"):
        optim.SGD(make_model().parameters(), method=method)
    with pytest.raises(TypeError, match="method must be a method of clext or None, got str"):
        optim.SGD(make_model().parameters(), method="si")
    method.update()  # not attached


# ----------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize("kind", TAKEN_OVER)
def test_launch_and_after_step_are_a_step(kind, device):
    results = []
    for apart in (False, True):
        model = make_model().to(device)
        method = kind(model)
        optimizer = learn(model, method)
        for x, y in make_task(1, device=device):
            F.cross_entropy(model(x), y).backward()
            if apart:
                optimizer.launch()
                method.after_step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        results.append((model, method))
    (model, method), (other, expected) = results
    assert_same_state(model.state_dict(), other.state_dict())
    assert_same_state(method.state_dict(), expected.state_dict())


@pytest.mark.parametrize("kind", TAKEN_OVER)
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
def test_a_captured_step_is_replayed(kind, optimizer, device):
    """On CUDA forward, backward and step in a graph; elsewhere there is nothing to capture."""
    if device != "cuda":
        pytest.skip("CUDA graphs need CUDA")
    options = {"lr": 0.02} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    results = []
    for captured in (False, True):
        model = make_model(torch.float32).to(device)
        method = kind(model)
        stepper = getattr(optim, optimizer)(
            model.parameters(), **options, method=method, clear_grad=True
        )
        learn(model, method, 1, stepper)
        batches = make_task(1, torch.float32, device)
        steps_of(model, stepper, method, batches, captured)
        results.append((model, method, stepper))
    (model, method, stepper), (other, expected, replayed) = results
    assert method.state_dict()["counters"] == expected.state_dict()["counters"]
    # Matrix products of a graph may be done by another kernel.
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)
    states = [each.state_dict()["state"] for each in (method, expected)]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(stepper.penalty, replayed.penalty, rtol=1e-3, atol=1e-4)


def steps_of(model, stepper, method, batches, captured):
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
                method.after_step()
            else:
                forward_and_backward()
                stepper.step()
    torch.cuda.current_stream().wait_stream(stream)


def test_what_cannot_be_captured_says_so(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need CUDA")
    model = make_model().to(device)
    method = RWalk(model)
    optimizer = optim.Adam(model.parameters(), method=method)
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
