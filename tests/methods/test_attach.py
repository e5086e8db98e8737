"""`method.attach(optimizer)`: one line for any optimizer of torch, closures included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from naive_methods import CASES
from toy_training import CLASSES, make_model, make_task

from clext import EWC, SI, Replay, optim

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.02),
    "adam fused": lambda params: torch.optim.Adam(params, lr=0.02, fused=True),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.02),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


def protected(kind=SI, device="cpu"):
    model = make_model().to(device)
    return model, kind(model, strength=3.0)


def by_hand(model, method, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        method.add_penalty_grad_()
        optimizer.step()
        method.update()
        optimizer.zero_grad()


def attached(model, _method, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_closure(model, _method, optimizer, batches):
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize(
    ("name", "case"),
    [*((name, "si") for name in OPTIMIZERS), *(("sgd", c) for c in ("ewc", "rwalk released"))],
)
@pytest.mark.parametrize("loop", [attached, with_closure])
def test_attached_is_by_hand(name, case, loop, device):
    make = OPTIMIZERS[name]
    models = []
    for train in (by_hand, loop):
        kind, _, strength, options = CASES[case]
        model = make_model().to(device)
        method = kind(model, strength=strength, **options)
        for number in range(2):
            batches = make_task(number, device=device)
            optimizer = make(
                [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]
            )
            if train is not by_hand:
                method.attach(optimizer)
            train(model, method, optimizer, batches)
            method.consolidate(batches)
        models.append((model, method))
    (one, first), (other, second) = models
    assert all(map(torch.equal, one.parameters(), other.parameters()))
    for name, entry in first.importance.items():
        assert torch.equal(entry, second.importance[name])


@pytest.mark.parametrize("way", ["attached", "by hand"])
@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_a_step_of_lbfgs_begins_at_its_first_evaluation(way, search, device):
    """The path: the first evaluation's task gradient times the movement of the whole step."""
    model, method = protected(device=device)
    method.importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    method.anchor = {name: p + 0.1 for name, p in model.named_parameters()}
    x, y = make_task(0, device=device)[0]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn=search)
    handle = method.attach(optimizer) if way == "attached" else None
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        evaluations.append([p.grad.clone() for p in model.parameters()])
        return loss if handle else loss + method.add_penalty_grad_()

    start = [p.detach().clone() for p in model.parameters()]
    optimizer.step(closure)
    if handle is None:
        method.update()
    assert len(evaluations) > 2
    for path, gradient, was, now in zip(
        method._state.lists["path"], evaluations[0], start, model.parameters(), strict=True
    ):
        torch.testing.assert_close(path, -gradient * (now.detach() - was))

    # And the step itself is that of the whole loss.
    reference = torch.optim.LBFGS(twin.parameters(), max_iter=4, line_search_fn=search)

    def whole():
        reference.zero_grad()
        pulls = zip(twin.parameters(), method.anchor.values(), strict=True)
        loss = F.cross_entropy(twin(x), y) + 3.0 * sum(((p - a) ** 2).sum() for p, a in pulls)
        loss.backward()
        return loss

    reference.step(whole)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_a_closure_gets_its_loss_back_with_the_penalty():
    model, method = protected(EWC)
    method.importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    method.anchor = {name: p + 1.0 for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = method.attach(optimizer)
    loss = optimizer.step(lambda: torch.tensor(2.0))
    count = sum(p.numel() for p in model.parameters())
    assert loss.item() == pytest.approx(2.0 + 3.0 * count)
    assert handle.penalty.item() == pytest.approx(3.0 * count)
    assert optimizer.step(closure=lambda: None) is None


def test_removed_it_leaves_the_optimizer_as_it_was():
    model, method = protected()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = method.attach(optimizer)
    attached(model, method, optimizer, make_task(0)[:3])
    assert method.steps == 3
    handle.remove()
    attached(model, method, optimizer, make_task(0)[:3])
    assert method.steps == 3
    handle = method.attach(optimizer)
    with pytest.raises(RuntimeError, match="in these gradients already"):
        by_hand(model, method, optimizer, make_task(0)[:1])


def test_other_optimizers_are_left_alone():
    model, method = protected()
    others = torch.nn.Linear(2, 2)
    method.attach(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = torch.optim.SGD(others.parameters(), lr=0.1)
    others(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert method.steps == 0


def test_a_combination_attaches_its_pull(device):
    model = make_model().to(device)
    method = EWC(model).combine(Replay(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(optimizer)
    for number in range(2):
        batches = make_task(number, device=device)
        for x, y in batches:
            method.loss(x, y % CLASSES).backward()
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate(batches)
    assert method.tasks == 2
    assert bool(method.protector.importance["0.weight"].any())


def test_what_it_cannot_be_attached_to_is_refused():
    model, method = protected(EWC)
    other = torch.optim.SGD(make_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="ewc was made for a model that has none of the param"):
        method.attach(other)
    fused = optim.SGD(model.parameters(), lr=0.1, method=method)
    with pytest.raises(ValueError, match=r"its step does all of it; leave attach\(\) out"):
        method.attach(fused)


def test_it_follows_a_head_that_has_grown_as_a_new_fused_optimizer_does():
    model, method = protected()
    model[2] = torch.nn.Linear(6, CLASSES + 2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method.attach(optimizer)
    attached(model, method, optimizer, make_task(0))
    assert bool(method._state.lists["path"][2].any())
