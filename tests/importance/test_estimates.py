"""Importance estimates against plain loops over samples."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from importance_models import (
    BY_RULE,
    BY_TORCH_FUNC,
    CLASSES,
    Functional,
    Residual,
    SelfChecking,
    convolution,
    make_batches,
    params_of,
)
from importance_oracle import (
    assert_close,
    fisher_oracle,
    gradients_of,
    mas_oracle,
    mean,
    scp_oracle,
)
from torch import nn

from clext import Supervision
from clext.importance import (
    SlowImportanceWarning,
    fisher_information,
    output_sensitivity,
    sliced_cramer_importance,
)

ESTIMATES = (fisher_information, output_sensitivity, sliced_cramer_importance)
slow = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")


@pytest.fixture
def fast_model(device):
    return Residual().to(device, torch.float64)


def assert_those_of_single_samples(model):
    params, batches = params_of(model), make_batches()
    for kind in ("empirical", "exact", "reversed"):
        flags = {"exact": kind == "exact", "reverse": kind == "reversed"}
        expected = fisher_oracle(model, params, batches, **flags)
        assert_close(fisher_information(model, params, batches, kind=kind), expected)
    assert_close(output_sensitivity(model, params, batches), mas_oracle(model, params, batches))
    expected = scp_oracle(model, params, batches)
    assert_close(sliced_cramer_importance(model, params, batches), expected)


@pytest.mark.parametrize("make", BY_RULE)
def test_estimates_by_rule_are_those_of_single_samples(make, device):
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        assert_those_of_single_samples(make().to(device, torch.float64))


@slow
@pytest.mark.parametrize("make", BY_TORCH_FUNC)
def test_estimates_by_torch_func_are_those_of_single_samples(make, device):
    assert_those_of_single_samples(make().to(device, torch.float64))


def batch_means(model, params, batches, kind):
    samples = sum(len(x) for x, _ in batches)
    expected = [torch.zeros_like(p) for p in params]
    for x, y in batches:
        outputs = model(x.to(params[0].device))
        loss = F.cross_entropy(outputs, y.to(outputs.device))
        if kind == "mas":
            loss = outputs.square().sum(1).mean()
        for total, g in zip(expected, gradients_of(loss, params), strict=True):
            total += len(x) / samples * (g.square() if kind == "fisher" else g.abs())
    return expected


def test_batch_estimates_square_or_take_the_size_of_batch_means(fast_model):
    params, batches = params_of(fast_model), make_batches()
    got = fisher_information(fast_model, params, batches, kind="batch")
    assert_close(got, batch_means(fast_model, params, batches, "fisher"))
    got = output_sensitivity(fast_model, params, batches, estimator="batch")
    assert_close(got, batch_means(fast_model, params, batches, "mas"))


@pytest.mark.parametrize(
    "estimate",
    [
        fisher_information,
        lambda *a: fisher_information(*a, kind="exact"),
        lambda *a: fisher_information(*a, kind="sample"),
        output_sensitivity,
        sliced_cramer_importance,
        lambda *a: sliced_cramer_importance(*a, slices=2),
    ],
)
def test_estimates_do_not_depend_on_the_batches(fast_model, estimate):
    params = params_of(fast_model)
    x, y = (torch.cat(entries) for entries in zip(*make_batches(), strict=True))
    whole = estimate(fast_model, params, [(x, y)])
    single = estimate(fast_model, params, list(zip(x.split(1), y.split(1), strict=True)))
    assert_close(whole, single)


class Narrowed(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)[:, 1:]


@slow
@pytest.mark.parametrize("make", [Residual, Functional, SelfChecking])
def test_outputs_may_come_by_another_way_than_the_models_own_call(make):
    """As with heads, of which some are active: labels count from the first of them."""
    model = make().double()
    params = params_of(model)
    batches = [(x, y % (CLASSES - 1)) for x, y in make_batches()]
    narrow = Supervision(
        model, forward=lambda model, batch: model(batch[0])[:, 1:], labels=lambda batch: batch[1]
    )
    for estimate, options in (
        *((fisher_information, {"kind": kind}) for kind in ("empirical", "exact", "batch")),
        (output_sensitivity, {}),
        (sliced_cramer_importance, {}),
    ):
        got = estimate(model, params, batches, supervision=narrow, **options)
        expected = estimate(Narrowed(model), params, batches, **options)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------ draws


def test_sampled_fisher_averages_to_the_exact_one(fast_model):
    params = params_of(fast_model)
    x, y = make_batches((4,))[0]
    exact = fisher_information(fast_model, params, [(x, y)], kind="exact")
    many = [(x.repeat(4000, 1), y.repeat(4000))]
    sampled = fisher_information(fast_model, params, many, kind="sample", seed=1)
    for mine, theirs in zip(sampled, exact, strict=True):
        assert (mine - theirs).norm() < 0.05 * theirs.norm()


def test_sampled_fisher_is_drawn_from_its_seed(fast_model):
    params, batches = params_of(fast_model), make_batches()

    def sampled(seed):
        return fisher_information(fast_model, params, batches, kind="sample", seed=seed)[0]

    torch.rand(5)  # the global generator plays no part
    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))


@pytest.mark.parametrize("slices", [2, 3000])
def test_sliced_scp_averages_to_the_exact_one(fast_model, slices):
    """With fewer directions than outputs, and with more."""
    params, batches = params_of(fast_model), make_batches((4,))
    exact = sliced_cramer_importance(fast_model, params, batches)
    drawn = mean(
        [
            sliced_cramer_importance(fast_model, params, batches, slices=slices, seed=seed)
            for seed in range(max(1, 400 // slices))
        ]
    )
    assert all(bool((entry >= 0).all()) for entry in drawn)
    for mine, theirs in zip(drawn, exact, strict=True):
        assert (mine - theirs).norm() < 0.2 * theirs.norm()


@pytest.mark.parametrize("slices", [1, 7])
def test_sliced_scp_of_one_output_has_no_noise(device, slices):
    """The unit sphere of one dimension is 1 and -1."""
    model = nn.Linear(6, 1).to(device, torch.float64)
    params, batches = params_of(model), make_batches()
    exact = sliced_cramer_importance(model, params, batches)
    drawn = sliced_cramer_importance(model, params, batches, slices=slices)
    assert_close(drawn, exact, rtol=1e-6)


def test_sliced_scp_takes_float32_and_float64_parameters_together(device):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.low, self.high = nn.Linear(6, 4), nn.Linear(4, CLASSES).double()

        def forward(self, x):
            return self.high(self.low(x).double())

    model = Mixed().to(device)
    batches = make_batches(dtype=torch.float32)
    drawn = sliced_cramer_importance(model, params_of(model), batches, slices=3000)
    exact = sliced_cramer_importance(model, params_of(model), batches)
    assert [entry.dtype for entry in drawn] == [torch.float32] * 2 + [torch.float64] * 2
    for mine, theirs in zip(drawn, exact, strict=True):
        assert (mine - theirs).norm() < 0.1 * theirs.norm()


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_models_get_float32_importances(device, dtype):
    model = Residual().to(device, torch.float64)
    expected = fisher_oracle(model, params_of(model), make_batches())
    model.to(dtype)
    got = fisher_information(model, params_of(model), make_batches(dtype=dtype))
    assert all(entry.dtype == torch.float32 for entry in got)
    rtol = 1e-4 if dtype == torch.float32 else 0.1
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() < rtol * theirs.norm()


def test_estimates_have_the_layout_of_the_parameters(device):
    model = convolution().to(device)
    params = params_of(model)
    batches = make_batches(dtype=torch.float32)
    for estimate in ESTIMATES:
        for entry, parameter in zip(estimate(model, params, batches), params, strict=True):
            assert entry.stride() == parameter.stride()
            assert entry.device == parameter.device


def test_a_layer_without_outputs_has_an_importance_as_empty_as_its_weight():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.head = nn.Linear(4, 0), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(x) + self.none(x).sum()

    model = Model()
    batches = [(torch.randn(5, 4), torch.arange(5).remainder(3))]
    expected = fisher_information(model.head, list(model.head.parameters()), batches)
    got = fisher_information(model, list(model.parameters()), batches)
    assert [entry.shape for entry in got[:2]] == [(0, 4), (0,)]
    for mine, theirs in zip(got[2:], expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_parameters_have_no_importance(fast_model):
    params = params_of(fast_model)
    fast_model.second.requires_grad_(False)
    for estimate in ESTIMATES:
        got = estimate(fast_model, params, make_batches())
        assert got[2].eq(0).all()
        assert got[0].gt(0).any()
    fast_model.requires_grad_(False)
    for estimate in ESTIMATES:
        with pytest.raises(ValueError, match="are frozen, so they have no gradient"):
            estimate(fast_model, params, make_batches())


def test_compiled_models_are_seen_through(device):
    model = Residual().to(device, torch.float64)
    expected = fisher_oracle(model, params_of(model), make_batches())
    compiled = torch.compile(model, backend="eager")
    assert_close(fisher_information(compiled, params_of(compiled), make_batches()), expected)


def test_unknown_kinds_are_refused_with_the_nearest_one():
    model = Residual()
    with pytest.raises(ValueError, match="did you mean 'empirical'"):
        fisher_information(model, params_of(model), [], kind="empiric")
    for seed in ("a", -1):
        for function in (fisher_information, sliced_cramer_importance):
            with pytest.raises(ValueError, match=f"{function.__name__}: seed must be an integer"):
                function(model, params_of(model), [], seed=seed)
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        output_sensitivity(model, params_of(model), [], estimator="batches")
    with pytest.raises(ValueError, match="slices must be an integer >= 1"):
        sliced_cramer_importance(model, params_of(model), [], slices=0)
