"""The penalty of values that are given by name, in place of the model's parameters."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap
from toy_training import make_model, make_task, train_tasks

from clext import EWC, METHODS, SI, Combined, Replay
from clext.methods import make_method

pytestmark = pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning")


def learned(device, **options):
    method = EWC(make_model().to(device), anchors="all", **options)
    train_tasks(method.model, method, tasks=2)
    assert method.constant > 0
    return method


def values_of(model, scale=0.5):
    return {
        name: (p + scale * torch.randn_like(p)).detach() for name, p in model.named_parameters()
    }


def written_out(method, params):
    total = method.constant
    for name, theta in params.items():
        total = total + (method.importance[name] * (theta - method.anchor[name]) ** 2).sum()
    return method.strength * total


def close(left, right):
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_of_these_values_and_no_others(device):
    method = learned(device)
    given = values_of(method.model)
    steps = method.steps
    close(method.penalty(given), written_out(method, given))
    some = {"0.weight": given["0.weight"]}
    own = {name: p.detach() for name, p in method.model.named_parameters()}
    close(method.penalty(some).detach(), written_out(method, own | some))
    assert method.steps == steps  # nothing was trained


def test_under_transforms(device):
    method = learned(device)
    given, tangents = values_of(method.model), values_of(method.model)
    for mine, theirs in zip(
        (grad(method.penalty)(given), jvp(method.penalty, (given,), (tangents,))),
        (
            grad(lambda p: written_out(method, p))(given),
            jvp(lambda p: written_out(method, p), (given,), (tangents,)),
        ),
        strict=True,
    ):
        close(mine, theirs)
    both = {name: torch.stack([entry, tangents[name]]) for name, entry in given.items()}
    expected = torch.stack([written_out(method, each) for each in (given, tangents)])
    close(vmap(method.penalty)(both), expected)


def test_a_functional_loss_has_the_gradient_of_the_usual_one(device):
    method = learned(device)
    x, y = make_task(3, device=device)[0]
    given = dict(method.model.named_parameters())

    def loss(params):
        outputs = functional_call(method.model, params, (x,))
        return torch.nn.functional.cross_entropy(outputs, y) + method.penalty(params)

    gradients = grad(loss)({name: p.detach() for name, p in given.items()})
    (torch.nn.functional.cross_entropy(method.model(x), y) + method.penalty()).backward()
    for name, parameter in given.items():
        close(gradients[name], parameter.grad)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_by_the_names_of_a_wrapper(prefix):
    method = learned("cpu")
    given = values_of(method.model)
    wrapped = {prefix + name: entry for name, entry in given.items()}
    close(method.penalty(wrapped), method.penalty(given))


def test_a_frozen_parameter_counts_where_it_is_known():
    method = learned("cpu")
    method.model[0].bias.requires_grad_(False)
    given = values_of(method.model)
    close(method.penalty(given), written_out(method, given))
    frozen = make_model()
    frozen[0].requires_grad_(False)
    assert SI(frozen).penalty(values_of(frozen)).item() == 0  # known are the trainable ones alone


def test_a_path_does_not_take_it_for_a_step():
    method = SI(make_model())
    method.importance["2.bias"].fill_(1.0)
    value = method.penalty({name: p + 1 for name, p in method.model.named_parameters()})
    assert value.requires_grad
    with pytest.raises(RuntimeError, match="saw no step"):
        method.update()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_them(name):
    method = make_method(name, make_model())
    assert method.penalty(values_of(method.model)).item() == 0


def test_a_combination_takes_them():
    model = make_model()
    protector = EWC(model, strength=1.0)
    method = Combined(protector, Replay(model))
    protector.importance["2.bias"].fill_(1.0)
    given = {"2.bias": protector.anchor["2.bias"] + 1}
    assert method.penalty(given).item() == pytest.approx(3.0)


def test_other_names_and_shapes_are_refused():
    method = learned("cpu")
    for given, message in (
        (
            {"bias": torch.ones(3)},
            r"given 'bias' of shape \[3\], expected a parameter of the model",
        ),
        ({"2.bias": torch.ones(4)}, r"given '2.bias' of shape \[4\], expected \[3\]"),
    ):
        with pytest.raises(ValueError, match=f"^ewc: penalty was {message}"):
            method.penalty(given)
