"""Models whose importance is measured by different ways, and small batches of data for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from clext.core.parameters import trainable_parameters

CLASSES = 3


class Residual(nn.Module):
    """Uses what a layer returned twice, and changes it in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 5, bias=False)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        hidden = F.relu(self.first(x), inplace=True)
        return self.head(hidden + torch.tanh(self.second(input=hidden)))


class Functional(nn.Module):
    """Uses a layer's weight a second time where no hook can see it."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(F.linear(self.layer(x).tanh(), self.layer.weight))


class Prototypes(nn.Module):
    """Has parameters of its own, in no layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 5), nn.Linear(4, CLASSES)
        self.prototypes = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        nearer = torch.maximum(self.layer(x).unsqueeze(1), self.prototypes)
        return self.head(torch.tanh(nearer.sum(2)))


class SelfChecking(nn.Module):
    """Looks at a value on its way, which torch.func cannot batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Bilinear(6, 6, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        hidden = self.layer(x, x.flip(1))
        if hidden.isnan().any().item():
            raise FloatingPointError
        return self.head(hidden)


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, CLASSES))
    model[2].weight = model[0].weight
    return model


def partly_frozen():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES))
    model[1].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    return model


def batch_norm():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, CLASSES))
    model(torch.randn(8, 6))  # running statistics that are not the initial ones
    return model


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    ).to(memory_format=torch.channels_last)


def unused_layer():
    model = nn.Sequential(nn.Linear(6, CLASSES))
    model.spare = nn.Linear(4, 4)
    model.forward = lambda x: model[0](x)
    return model


BY_RULE = [
    Residual,
    partly_frozen,
    unused_layer,
    lambda: nn.Linear(6, CLASSES),
    tied,
    batch_norm,
    convolution,
    Functional,
]
BY_TORCH_FUNC = [Prototypes, SelfChecking]


def make_batches(sizes=(4, 1, 5), *, features=6, dtype=torch.float64):
    """(x, y) batches on the CPU, whatever device the model is on."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, features, generator=generator).to(dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


def params_of(model):
    return list(trainable_parameters(model).values())
