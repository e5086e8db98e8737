"""The task that all contestants are given, and the line that each prints at its end.

Two permutations of MNIST's pixels, the first 10,000 training images and all test images, as plain
tensors; a perceptron and the settings of its training. Nothing here imports clext or a framework.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

IMAGES, TASKS, EPOCHS, BATCH, LR = 10_000, 2, 5, 128, 1e-3
Examples = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    method: str
    strength: float
    seed: int
    model: nn.Module
    tasks: list[tuple[Examples, Examples]]  # training and test


def raw() -> Path:
    """The folder of the four files of MNIST."""
    return Path(os.environ["CLEXT_DATA"], "MNIST", "raw")


def examples(part: str) -> Examples:
    images = np.fromfile(raw() / f"{part}-images-idx3-ubyte", np.uint8, offset=16)
    labels = np.fromfile(raw() / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    x = torch.from_numpy(images).view(-1, 784).float() / 255
    return x[:IMAGES], torch.from_numpy(labels).long()[:IMAGES]


def permuted(seed: int) -> list[tuple[Examples, Examples]]:
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(784, generator=generator) for _ in range(TASKS)]
    (x, y), (test_x, test_y) = examples("train"), examples("t10k")
    return [((x[:, order], y), (test_x[:, order], test_y)) for order in orders]


def perceptron() -> nn.Module:
    hidden = [nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(256, 10))


def setting() -> Setting:
    """What the command line asks for: METHOD STRENGTH SEED."""
    method, strength, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(seed)
    return Setting(method, strength, seed, perceptron(), permuted(seed))


def report(seconds: float, accuracies: list[float]) -> None:
    """`seconds` of the processor, for training and importance; accuracies after the last task."""
    print(json.dumps({"seconds": seconds, "accuracies": accuracies}))
