"""Kept examples that were loaded, and the batches that come after them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods import make_method


class Noisy(nn.Module):
    """Takes images of any size; a batch norm that counts, and dropout in eval mode too."""

    def __init__(self, channels=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        features = self.norm(self.conv(images)).mean(dim=(2, 3))
        return self.head(nn.functional.dropout(features, training=True))


def perceptron(features):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, 3))


def learned(name, model, shape):
    """A method after a task of so large inputs."""
    method = make_method(name, model)
    examples = torch.rand(6, *shape), torch.arange(6) % 3
    began = method.begin_task(examples)
    method.loss(*began)
    method.consolidate([examples])
    return method


def test_rows_of_another_precision_than_the_model_are_taken():
    state = learned("replay", perceptron(6), (2, 3)).state_dict()
    method = clext.Replay(perceptron(6).double())
    method.load_state_dict(state)
    assert method._memory.size == 6


def test_replay_refuses_batches_of_another_size_than_it_has_loaded_before_it_draws():
    method = clext.Replay(Noisy())
    method.load_state_dict(learned("replay", Noisy(), (1, 6, 6)).state_dict())
    images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    before = method.state_dict()
    message = r"^replay: inputs are torch.float32 \[1, 8, 8\] each, expected .*\[1, 6, 6\] as those"
    for refuse in (
        lambda: method.begin_task((images, labels)),
        lambda: method.loss(images, labels),
    ):
        with pytest.raises(ValueError, match=message):
            refuse()
        assert_same_state(method.state_dict(), before)
