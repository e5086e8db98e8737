"""Optimizers of clext beside their namesakes in torch, on twins of one model."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from clext import optim

# Name: class, its namesake, options.
CASES = {
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 0.05}),
    "sgd momentum": (optim.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "sgd dampening": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1},
    ),
    "sgd nesterov": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    ),
    "sgd maximize": (
        optim.SGD,
        torch.optim.SGD,
        {"lr": 0.01, "momentum": 0.5, "maximize": True, "weight_decay": 0.1},
    ),
    "adam": (optim.Adam, torch.optim.Adam, {"lr": 0.02}),
    "adam decay": (
        optim.Adam,
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    ),
    "adam no memory": (
        optim.Adam,
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.0, 0.0), "eps": 1e-2},
    ),
    "adam maximize": (optim.Adam, torch.optim.Adam, {"lr": 0.01, "maximize": True}),
    "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 0.02}),
    "adamw maximize": (
        optim.AdamW,
        torch.optim.AdamW,
        {"lr": 0.02, "weight_decay": 0.3, "maximize": True},
    ),
}
PLAIN = ("sgd momentum", "adam", "adamw")  # one of each class, with state

CLOSE = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-5, "atol": 2e-6}}


class Net(nn.Module):
    """Tensors of several shapes and layouts; a second head that need not take part."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.conv.to(memory_format=torch.channels_last)
        self.body = nn.Linear(48, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x, head=0):
        x = torch.tanh(self.conv(x)).flatten(1)
        return self.heads[head](torch.tanh(self.body(x)))


def twins(device, dtype=torch.float64, count=2):
    torch.manual_seed(3)
    model = Net().to(device, dtype)
    return [model, *(copy.deepcopy(model) for _ in range(count - 1))]


def make_pair(case, device, dtype=torch.float64, params=lambda model: model.parameters(), **more):
    """Twin models, each with its optimizer, clext's first."""
    *kinds, options = CASES[case]
    return [
        (model, kind(params(model), **(options | more)))
        for kind, model in zip(kinds, twins(device, dtype), strict=True)
    ]


def batch(step, model):
    like = next(model.parameters())
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 2, 4, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (4,), generator=generator)
    return x.to(like.device, like.dtype), y.to(like.device)


def loss_of(model, step, head=0):
    x, y = batch(step, model)
    return F.cross_entropy(model(x, head), y)


def train(model, optimizer, steps, head=0, after=lambda: None):
    """Plain steps number `steps`, a range."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step, head).backward()
        optimizer.step()
        after()


def assert_same_parameters(one, other, dtype=torch.float64):
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE[dtype])
