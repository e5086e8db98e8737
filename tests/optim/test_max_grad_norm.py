"""max_grad_norm: the task's gradient is clipped where it moves the parameters, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from optim_cases import PLAIN, assert_same_parameters, loss_of, make_pair, train

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
