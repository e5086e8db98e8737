"""Models of the kinds that importances are measured for, all of them small enough for one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from clext.training.models import mlp

CLASSES = 10
VOCABULARY, WIDTH, LENGTH = 1000, 128, 32


def cnn() -> nn.Module:
    """Two convolutions and two linear layers for 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


class Block(nn.Module):
    """Two convolutions with batch normalisation around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet() -> nn.Module:
    """A residual net for 3 x 32 x 32: 16, 32 and 64 channels, two blocks each."""
    widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Block(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


class TokenMixer(nn.Module):
    """Embedding, residual blocks of LayerNorm and two linear layers on each token, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )
            for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden.mean(1))


def tokens(samples: int) -> Tensor:
    return torch.randint(VOCABULARY, (samples, LENGTH))


def pictures(samples: int) -> Tensor:
    return torch.rand(samples, 3, 32, 32)


@dataclass(frozen=True)
class Case:
    """A model, inputs for it, and a task: how many batches of what size."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    batches: int


# As many batches as a task of Permuted MNIST has (60,000 images), or of Split CIFAR-10 (10,000).
CASES = {
    "mlp": Case(mlp, lambda samples: torch.rand(samples, 784), 128, 469),
    "cnn": Case(cnn, pictures, 128, 79),
    "resnet": Case(resnet, pictures, 64, 157),
    "tokens": Case(TokenMixer, tokens, 64, 157),
}
