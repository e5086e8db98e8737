"""A state whose kept examples do not go through the model is refused when it is loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods import make_method

KEEPING = ["replay", "gem", "agem", "joint", "icarl"]


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


@pytest.mark.parametrize("name", [*KEEPING, "ewc+replay"])
def test_rows_that_the_model_does_not_take_are_refused(name):
    """The parameters of the states are those of the method's own model, the rows are not."""
    state = learned(name, perceptron(6), (2, 3)).state_dict()
    other = learned(name, perceptron(5), (5,)).state_dict()
    if "+" in name:
        other["rehearsal"]["extra"] = state["rehearsal"]["extra"] | {}
    else:
        other["extra"] = {**state["extra"]}
        if name == "icarl":
            other["extra"]["previous"] = None
    for own in (make_method(name, perceptron(5)), learned(name, perceptron(5), (5,))):
        before, random = own.state_dict(), torch.get_rng_state()
        message = (
            r"holds inputs torch.float32 \[2, 3\] each, which this model does not take \(.*mat1"
        )
        with pytest.raises(ValueError, match=message) as caught:
            own.load_state_dict(other)
        assert "\n" not in str(caught.value)
        assert_same_state(own.state_dict(), before)
        assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", KEEPING)
def test_to_try_a_row_leaves_nothing_behind(name):
    torch.manual_seed(0)
    method = learned(name, Noisy(), (1, 6, 6))
    own = make_method(name, Noisy())
    own.model.load_state_dict(method.model.state_dict())
    own.model.norm.eval()
    before = {key: value.clone() for key, value in own.model.state_dict().items()}
    random = torch.get_rng_state()
    own.load_state_dict(method.state_dict())
    assert torch.equal(torch.get_rng_state(), random)
    assert_same_state(own.model.state_dict(), before)
    assert own.model.training
    assert not own.model.norm.training
    assert_same_state(own.state_dict(), method.state_dict())


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
