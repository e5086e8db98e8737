"""Scaled gradients on processes: what is infinite on one of them skips the step on all."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded_models import (
    WAYS,
    all_batches,
    make_loader,
    make_network,
    make_steps,
    plain_parameters,
)
from sharded_training import assert_close, state_of
from toy_training import assert_same_state

import clext

SKIPPED = 2  # of the steps of each task


def by_hand(model, method):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def step(scaler):
        method.add_penalty_grad_(scaler)
        taken = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == taken:
            method.update()

    return optimizer, step


def unscaled(model, method):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def step(scaler):
        scaler.unscale_(optimizer)
        method.add_penalty_grad_()
        taken = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == taken:
            method.update()

    return optimizer, step


def by_scaler(optimizer):
    def step(scaler):
        scaler.step(optimizer)
        scaler.update()

    return optimizer, step


def attached(model, method):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    method.attach(optimizer)
    return by_scaler(optimizer)


def fused(model, method):
    return by_scaler(clext.optim.Adam(model.parameters(), lr=0.02, method=method))


def clipped(model, method):
    options = {"lr": 0.02, "method": method, "max_grad_norm": 0.05}
    return by_scaler(clext.optim.Adam(model.parameters(), **options))


def overflow(name, model):
    """An infinite gradient; under DDP of all processes, under FSDP2 in the shard of the second."""
    gradient = model.head.weight.grad if name != "ddp" else model.module.head.weight.grad
    if name != "fsdp":
        gradient[2, 0] = torch.inf
    elif dist.get_rank() == 1:
        gradient.to_local()[0, 0] = torch.inf


def trained(name, kind, loop):
    way = WAYS[name]
    model = way.wrap(make_network(torch.float32))
    method = kind(model)
    optimizer, step = loop(model, method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for task in range(2):
        for number, (x, y) in enumerate(make_steps(task, way, dtype=torch.float32)):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            if number == SKIPPED:
                overflow(name, model)
            step(scaler)
            optimizer.zero_grad()
        data = all_batches(task, 1, torch.float32)
        method.consolidate(data if way.ranks == 1 else make_loader(task, way, torch.float32))
    return {
        "scale": [scaler.get_scale()],
        "parameters": plain_parameters(model),
        **state_of(method),
    }


@pytest.mark.parametrize("loop", [by_hand, unscaled, attached, fused, clipped])
@pytest.mark.parametrize("kind", [clext.SI, clext.EWC])
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_an_overflow_on_one_process(processes, name, kind, loop):
    expected = trained("single", kind, loop)
    first, second = processes(2).run(trained, name, kind, loop)
    assert expected["scale"] == [256.0]
    assert_close(first, expected, 1e-4)
    assert_same_state(second, first)
