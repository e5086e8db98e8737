"""The pull counts once: a fused step refuses gradients that hold it already."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from toy_training import make_model, make_task

from clext import EWC, SI, Combined, Replay, RWalk, optim

KINDS = [EWC, SI, RWalk]
every_kind = pytest.mark.parametrize("kind", KINDS)
REFUSED = r"the pull is in these gradients already .*; Adam adds it in its step: leave add_penalty_"


def protected(kind, device="cpu"):
    """A method in its second task, an optimizer with it, and a batch."""
    model = make_model().to(device)
    method = kind(model)
    method.importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    method.anchor = {name: p + 1.0 for name, p in model.named_parameters()}
    return method, optim.Adam(model.parameters(), lr=0.01, method=method), make_task(0)[0]


def task_loss(method, batch):
    x, y = (entry.to(next(method.model.parameters()).device) for entry in batch)
    return F.cross_entropy(method.model(x), y)


def by_hand(method, batch):
    task_loss(method, batch).backward()
    method.add_penalty_grad_()


def in_the_loss(method, batch):
    (task_loss(method, batch) + method.penalty()).backward()


def in_a_backward_of_its_own(method, batch):
    task_loss(method, batch).backward()
    method.penalty().backward()


def before_the_last_backward(method, batch):
    by_hand(method, batch)
    task_loss(method, batch).backward()


WAYS = [by_hand, in_the_loss, in_a_backward_of_its_own, before_the_last_backward]


@every_kind
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_second_pull_is_refused_and_changes_nothing(kind, way, set_to_none, device):
    method, optimizer, batch = protected(kind, device)
    before = [p.clone() for p in method.model.parameters()]
    way(method, batch)
    with pytest.raises(RuntimeError, match=REFUSED):
        optimizer.step()
    assert all(map(torch.equal, method.model.parameters(), before))
    optimizer.zero_grad(set_to_none=set_to_none)
    task_loss(method, batch).backward()
    optimizer.step()  # new gradients are none of it
    assert method.model[0].weight.ne(before[0]).all()


@every_kind
def test_a_penalty_that_is_looked_at_is_no_pull(kind, device):
    method, optimizer, batch = protected(kind, device)
    parameters = list(method.model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        task_loss(method, batch).backward()
        value = method.penalty()
        torch.autograd.grad(method.penalty(), parameters)
        optimizer.step()
        assert optimizer.penalty.item() == pytest.approx(value.item())


def test_of_a_combination_too():
    model = make_model()
    protector = EWC(model)
    method = Combined(protector, Replay(model, budget=4))
    optimizer = optim.Adam(model.parameters(), method=method)
    protector.importance["2.bias"].fill_(1.0)
    by_hand(method, make_task(0)[0])
    with pytest.raises(RuntimeError, match=REFUSED):
        optimizer.step()


@every_kind
def test_by_hand_it_is_refused_after_a_penalty_in_the_loss(kind):
    method, _, batch = protected(kind)
    in_the_loss(method, batch)
    with pytest.raises(
        RuntimeError, match=r"in these gradients already .*penalty\(\) not in the lo"
    ):
        method.add_penalty_grad_()


def test_a_penalty_in_each_loss_of_an_accumulation_stays_allowed():
    """As shares of it, with an optimizer of torch."""
    method, _, batch = protected(SI)
    for _ in range(2):
        (task_loss(method, batch) + 0.5 * method.penalty()).backward()
    torch.optim.SGD(method.model.parameters(), lr=0.1).step()
    method.update()
    assert method.steps == 1
