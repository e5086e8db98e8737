"""The model of the course."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from clext.core.seeding import linear


def mlp(
    in_features: int = 784, out_features: int = 10, random: torch.Generator | None = None
) -> nn.Sequential:
    """The course's multilayer perceptron: 1024, 512 and 256 hidden units with ReLU.

    Args:
        in_features: numbers in one flattened example.
        out_features: number of classes.
        random: draws the weights; by default torch's global generator.

    Returns:
        A module from [N, in_features] to logits [N, out_features].
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_features, 1024, 512, 256, out_features)):
        layers += [linear(inputs, outputs, random), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
