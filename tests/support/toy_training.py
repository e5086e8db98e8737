"""A small model, small tasks and the training loop that every method is made for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CLASSES, FEATURES, TASKS, STEPS = 3, 5, 3, 11


def make_model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)


def make_task(number, dtype=torch.float64, device="cpu"):
    """Batches of one task, on `device`."""
    generator = torch.Generator().manual_seed(100 + number)
    return [
        (
            torch.randn(4, FEATURES, generator=generator, dtype=torch.float64).to(device, dtype),
            torch.randint(CLASSES, (4,), generator=generator).to(device),
        )
        for _ in range(STEPS)
    ]


def train_steps(model, method, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        method.add_penalty_grad_()
        optimizer.step()
        method.update()
        optimizer.zero_grad()


def train_tasks(model, method, tasks=TASKS):
    parameter = next(model.parameters())
    for number in range(tasks):
        batches = make_task(number, parameter.dtype, parameter.device)
        train_steps(model, method, torch.optim.Adam(model.parameters(), lr=0.02), batches)
        method.consolidate(batches)


def assert_same_state(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same_state(value, other[key])
        elif isinstance(value, list):
            assert_same_state(dict(enumerate(value)), dict(enumerate(other[key])))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key
