"""How a method is made: by class or by name, and what is said about a bad option."""

from __future__ import annotations

import math

import pytest
from torch import nn
from toy_training import make_model

from clext import EWC, MAS, METHODS, SCP, SI, RWalk
from clext.methods import make_method


@pytest.fixture(params=METHODS)
def kind(request):
    return METHODS[request.param]


@pytest.mark.parametrize("strength", [-1.0, math.nan, math.inf, -math.inf, 10**400, "1", True])
def test_bad_strength_is_refused(kind, strength):
    with pytest.raises(ValueError, match=f"{kind.name}: strength must be a finite number >= 0"):
        kind(make_model(), strength=strength)
    method = kind(make_model())
    with pytest.raises(ValueError, match="strength must be"):
        method.strength = strength
    assert method.strength == kind.default_strength


@pytest.mark.parametrize("kind", [kind for kind in METHODS.values() if not kind.has_strength])
def test_a_strength_without_a_penalty_is_refused(kind):
    message = f"{kind.name} has no penalty, so no strength; leave it out"
    with pytest.raises(ValueError, match=message):
        make_method(kind.name, make_model(), strength=2.0)
    method = kind(make_model(), strength=0.0)
    with pytest.raises(ValueError, match=message):
        method.strength = 2.0
    state = {**method.state_dict(), "strength": 2.0}
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(state)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (EWC, {"fisher": "empiric"}, "did you mean 'empirical'"),
        (EWC, {"anchors": "every"}, r"option 'anchors' of ewc: 'every'.*'latest', 'all'"),
        (EWC, {"gamma": 1.1}, "gamma must be a finite number >= 0 and <= 1, got 1.1"),
        (EWC, {"seed": -1}, "seed must be an integer >= 0"),
        (EWC, {"weighting": "means"}, "did you mean 'mean'"),
        (MAS, {"gamma": -0.1}, "gamma must be a finite number >= 0 and <= 1"),
        (RWalk, {"variant": "release"}, "did you mean 'released'"),
        (MAS, {"estimator": "sample"}, "did you mean 'per_sample'"),
        (SI, {"xi": 0}, "xi must be a finite number >= 1.17549e-38, got 0"),
        (SI, {"clamp": "totel"}, r"option 'clamp' of si.*did you mean 'total'"),
        (RWalk, {"alpha": 0.0}, "alpha must be a finite number >= 1.17549e-38 and <= 1"),
        (RWalk, {"interval": 0}, "interval must be an integer >= 1, got 0"),
        (RWalk, {"eps": math.nan}, "eps must be a finite number >= 1.17549e-38"),
        (RWalk, {"mix": 2}, "mix must be"),
        (SCP, {"slices": 0}, "slices must be an integer >= 1"),
        (SCP, {"slices": "exakt"}, "did you mean 'exact'"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(make_model(), **options)


def test_model_without_trainable_parameter_is_refused(kind):
    with pytest.raises(ValueError, match="Flatten has no trainable parameter"):
        kind(nn.Flatten())


@pytest.mark.parametrize("model", [None, [nn.Linear(1, 1)], nn.Linear])
def test_what_is_no_model_is_refused(kind, model):
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        kind(model)


def test_every_option_is_an_attribute_and_shown(kind):
    method = kind(make_model())
    assert repr(method).startswith(f"{kind.__name__}(")
    assert ("strength=" in repr(method)) == kind.has_strength
    assert repr(method).endswith("tasks=0; 57 parameters)")


def test_make_method_by_name(kind):
    model = make_model()
    method = make_method(kind.name, model)
    assert type(method) is kind
    assert method.model is model
    if kind.has_strength:
        assert make_method(kind.name, model, strength=2.0).strength == 2.0
    assert make_method(kind.name, model).strength == kind.default_strength
    assert make_method(method, model) is method


def test_make_method_passes_options():
    assert make_method("si", make_model(), xi=0.5).xi == 0.5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ewk", {}, "unknown method 'ewk'; did you mean 'ewc'"),
        ("RWALK", {}, "did you mean 'rwalk'"),
        ("si", {"xl": 1.0}, "unknown option of si 'xl'; did you mean 'xi'"),
        ("ewc", {"strenght": 1.0}, "did you mean 'strength'"),
        ("baseline", {"gamma": 1.0}, "unknown option of baseline 'gamma'"),
    ],
)
def test_make_method_suggests_the_nearest_name(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_method(name, make_model(), **options)


def test_make_method_refuses_to_change_an_instance():
    method = SI(make_model())
    with pytest.raises(ValueError, match="instance already, so strength, xi cannot be set"):
        make_method(method, method.model, strength=1.0, xi=0.1)
    with pytest.raises(ValueError, match="made for another model"):
        make_method(method, make_model())
