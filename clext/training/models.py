"""The model of the course."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


def mlp(in_features: int = 784, out_features: int = 10) -> nn.Sequential:
    """The course's multilayer perceptron: 1024, 512 and 256 hidden units with ReLU.

    Args:
        in_features: numbers in one flattened example.
        out_features: number of classes.

    Returns:
        A module from [N, in_features] to logits [N, out_features].
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_features, 1024, 512, 256)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, out_features))
