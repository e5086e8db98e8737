"""How a method is made: by class or by name, and what is said about a bad option."""

from __future__ import annotations

import math

import pytest
from torch import nn
from toy_training import make_model

import clext
from clext import (
    AGEM,
    DGR,
    EWC,
    GEM,
    MAS,
    METHODS,
    SCP,
    SI,
    ICaRL,
    LwF,
    Replay,
    RWalk,
)
from clext.methods import make_method

every_kind = pytest.mark.parametrize("kind", METHODS.values())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        *(
            (EWC, {"strength": value}, "ewc: strength must be a finite number >= 0")
            for value in (-1.0, math.nan, math.inf, 10**400, "1", True)
        ),
        (AGEM, {"strength": 1.0}, "agem has no penalty, so no strength; leave it out"),
        (EWC, {"fisher": "empiric"}, "did you mean 'empirical'"),
        (EWC, {"anchors": "every"}, r"option 'anchors' of ewc: 'every'.*'latest', 'all'"),
        (EWC, {"gamma": 1.1}, "gamma must be a finite number >= 0 and <= 1, got 1.1"),
        (EWC, {"seed": -1}, "seed must be an integer >= 0"),
        (EWC, {"weighting": "means"}, "did you mean 'mean'"),
        (MAS, {"gamma": -0.1}, "gamma must be a finite number >= 0 and <= 1"),
        (MAS, {"estimator": "sample"}, "did you mean 'per_sample'"),
        (SI, {"xi": 0}, "xi must be a finite number >= 1.17549e-38, got 0"),
        (SI, {"clamp": "totel"}, r"option 'clamp' of si.*did you mean 'total'"),
        (RWalk, {"variant": "release"}, "did you mean 'released'"),
        (RWalk, {"alpha": 0.0}, "alpha must be a finite number >= 1.17549e-38 and <= 1"),
        (RWalk, {"interval": 0}, "interval must be an integer >= 1, got 0"),
        (RWalk, {"eps": math.nan}, "eps must be a finite number >= 1.17549e-38"),
        (RWalk, {"mix": 2}, "mix must be"),
        (SCP, {"slices": 0}, "slices must be an integer >= 1"),
        (SCP, {"slices": "exakt"}, "did you mean 'exact'"),
        (LwF, {"temperature": 0}, "lwf: temperature must be .* >= 0.0001 and <= 10000, got 0"),
        (LwF, {"temperature": 2e4}, "temperature must be"),
        (LwF, {"scale": "square"}, "option 'scale' of lwf: 'square'; did you mean 'squared'"),
        (LwF, {"balance": "task"}, "did you mean 'tasks'"),
        (Replay, {"budget": 2.5}, "replay: budget must be an integer >= 1, got 2.5"),
        (Replay, {"batch": 0}, "batch must be an integer >= 1"),
        (Replay, {"policy": "balance"}, "did you mean 'balanced'"),
        (ICaRL, {"budget": True}, "icarl: budget must be an integer >= 1, got True"),
        (ICaRL, {"features": 3.0}, "features must be a layer's name, got 3.0"),
        (ICaRL, {"norm": 1}, "norm must be True or False, got 1"),
        (GEM, {"per_task": 0}, "gem: per_task must be an integer >= 1"),
        (GEM, {"margin": -0.1}, "gem: margin must be a finite number >= 0"),
        (GEM, {"ridge": math.nan}, "gem: ridge must be"),
        (AGEM, {"batch": 0}, "agem: batch must be an integer >= 1"),
        (DGR, {"distill": 1}, "dgr: distill must be True or False, got 1"),
        (DGR, {"hidden": ()}, r"dgr: hidden must be the widths of at least one layer, .* got \(\)"),
        (DGR, {"hidden": 400}, "hidden must be the widths .* got 400"),
        (DGR, {"hidden": (400, 0)}, "a width in hidden must be an integer >= 1, got 0"),
        (DGR, {"latent": 0}, "latent must be an integer >= 1, got 0"),
        (DGR, {"generator_lr": 0}, "generator_lr must be a finite number > 0, got 0"),
        (DGR, {"generator": nn.Linear(2, 2)}, "got Linear without loss and sample; leave it out"),
        (DGR, {"generator": 3}, "generator must be a torch.nn.Module .* got int without loss and"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        kind(make_model(), **options)
    assert "\n" not in str(caught.value)


@every_kind
def test_what_is_no_model_is_refused(kind):
    with pytest.raises(ValueError, match="Flatten has no trainable parameter"):
        kind(nn.Flatten())
    for model in (None, [nn.Linear(1, 1)], nn.Linear):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
            kind(model)


@every_kind
def test_made_by_name_and_shown_with_every_option(kind):
    model = make_model()
    method = make_method(kind.name, model)
    assert type(method) is kind
    assert method.model is model
    assert method.strength == kind.default_strength
    assert make_method(method, model) is method
    assert repr(method).startswith(f"{kind.__name__}(")
    assert ("strength=" in repr(method)) == kind.has_strength
    assert repr(method).endswith("tasks=0, steps=0; 57 parameters)")


def test_options_go_to_the_method():
    method = make_method("si", make_model(), strength=2.0, xi=0.5)
    assert (method.strength, method.xi) == (2.0, 0.5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ewk", {}, "unknown method 'ewk'; did you mean 'ewc'"),
        ("RWALKS", {}, "did you mean 'rwalk'"),
        ("si", {"xl": 1.0}, "unknown option of si 'xl'; did you mean 'xi'"),
        ("ewc", {"strenght": 1.0}, "did you mean 'strength'"),
        ("baseline", {"gamma": 1.0}, "unknown option of baseline 'gamma'"),
        ("gem", {"strength": 2.0}, "gem has no penalty, so no strength; leave it out"),
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


def test_every_method_is_a_name_of_clext():
    assert all(getattr(clext, kind.__name__) is kind for kind in clext.METHODS.values())
