"""The model of the course."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import nn


def mlp(
    in_features: int = 784, out_features: int = 10, generator: torch.Generator | None = None
) -> nn.Sequential:
    """The course's multilayer perceptron: 1024, 512 and 256 hidden units with ReLU.

    Args:
        in_features: numbers in one flattened example.
        out_features: number of classes.
        generator: draws the weights, the same that torch's global one would with its seed; by
            default that one.

    Returns:
        A module from [N, in_features] to logits [N, out_features].
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_features, 1024, 512, 256, out_features)):
        layers += [_linear(inputs, outputs, generator), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """An `nn.Linear` with the weights that its constructor draws, from a generator of one's own."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    return layer
