"""max_grad_norm: the task's gradient is clipped where it moves the parameters, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from optim_cases import PLAIN, assert_same_parameters, loss_of, make_pair, train
from toy_training import make_model, make_task

from clext import EWC, SI, RWalk, optim
from clext.optim import SGD

EXACT = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("max_norm", [0.05, 1e3])
def test_without_a_method_it_is_what_torch_clips(case, max_norm, device, plan):
    """Over all groups, so that their relation is kept."""

    def groups(model):
        rest = [*model.body.parameters(), *model.heads.parameters()]
        return [{"params": model.conv.parameters(), "lr": 0.001}, {"params": rest}]

    (model, mine), (other, theirs) = make_pair(case, device, params=groups)
    mine.max_grad_norm = max_norm
    for step in range(20):
        train(model, mine, range(step, step + 1))
        theirs.zero_grad()
        loss_of(other, step).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm)
        theirs.step()
    assert_same_parameters(model, other)


def test_the_norm_is_that_of_unscaled_gradients(device):
    (model, mine), (other, theirs) = make_pair("adam", device, torch.float32)
    mine.max_grad_norm = 0.05
    for each, optimizer in ((model, mine), (other, theirs)):
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
        for step in range(10):
            scaler.scale(loss_of(each, step)).backward()
            if step == 3:
                each.conv.bias.grad[0] = torch.inf
            if optimizer is theirs:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(each.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert_same_parameters(model, other, torch.float32)


def test_squares_of_half_precision_do_not_overflow(device):
    params = [
        torch.nn.Parameter(torch.zeros(64, device=device, dtype=dtype))
        for dtype in (torch.float16, torch.float16, torch.float32)
    ]
    for entry in params:
        entry.grad = torch.full_like(entry, 3e4)
    SGD(params, lr=1.0, max_grad_norm=1.0).step()
    for entry in params:
        torch.testing.assert_close(entry[0].item(), -(192**-0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [EWC, SI, RWalk], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_the_path_sees_the_whole_gradient_and_the_pull_is_not_clipped(kind, name, device):
    model = make_model().to(device)
    method = kind(model, strength=0.5)
    optimizer = getattr(optim, name)(model.parameters(), lr=0.02, method=method, max_grad_norm=0.1)
    for number in range(2):
        for x, y in make_task(number, device=device):
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        if number == 0:
            method.consolidate(make_task(0, device=device))
    lists = {key: [entry.clone() for entry in kept] for key, kept in method._state.lists.items()}
    other = make_model().to(device)
    other.load_state_dict(model.state_dict())
    reference = getattr(torch.optim, name)(other.parameters(), lr=0.02)
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share it
    x, y = make_task(2, device=device)[0]
    for each in (model, other):
        F.cross_entropy(each(x), y).backward()
    optimizer.step()

    grads = [p.grad.clone() for p in other.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
    assert norm > 0.2
    before = [p.detach().clone() for p in other.parameters()]
    for i, p in enumerate(other.parameters()):
        p.grad += 2 * 0.5 * lists["importance"][i] * (p.detach() - lists["anchor"][i])
    reference.step()
    for i, (mine, theirs) in enumerate(zip(model.parameters(), other.parameters(), strict=True)):
        torch.testing.assert_close(mine, theirs, **EXACT)
        if "path" in lists:
            path = lists["path"][i] - grads[i] * (theirs.detach() - before[i])
            torch.testing.assert_close(method._state.lists["path"][i], path, **EXACT)
        if "fisher" in lists:
            fisher = (1 - method.alpha) * lists["fisher"][i] + method.alpha * grads[i].square()
            torch.testing.assert_close(method._state.lists["fisher"][i], fisher, **EXACT)


def test_of_an_attached_method_the_pull_is_clipped_too(device):
    """As after add_penalty_grad_() of a loop by hand."""
    models = []
    for way in ("attached", "by hand"):
        model = make_model().to(device)
        method = RWalk(model, variant="released")
        if way == "attached":
            options = {"method": method, "max_grad_norm": 0.1}
            optimizer = optim.Adam(model.parameters(), lr=0.02, **options)
        else:
            optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for number in range(2):
            for x, y in make_task(number, device=device):
                F.cross_entropy(model(x), y).backward()
                if way == "by hand":
                    method.add_penalty_grad_()
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                if way == "by hand":
                    method.update()
                optimizer.zero_grad()
            method.consolidate()
        models.append((model, method))
    (model, method), (other, expected) = models
    torch.testing.assert_close(model.state_dict(), other.state_dict(), **EXACT)
    torch.testing.assert_close(
        method.state_dict()["state"], expected.state_dict()["state"], **EXACT
    )
