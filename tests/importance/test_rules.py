"""Each layer rule against plain loops over samples."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_models import CLASSES, make_batches, params_of
from importance_oracle import assert_close, fisher_oracle, mas_oracle, scp_oracle
from layer_models import FALLBACK, RULED, Custom
from torch import nn

from clext.importance import (
    SlowImportanceWarning,
    fisher_information,
    output_sensitivity,
    sliced_cramer_importance,
)
from clext.importance.rule import CHUNK_BYTES
from clext.importance.rules import rule_for


def batches_of(sizes=(4, 1, 5, 2), dtype=torch.float64):
    return make_batches(sizes, features=24, dtype=dtype)


def assert_all_estimates(model):
    params, batches = params_of(model), batches_of()
    estimates = [
        (fisher_information(model, params, batches), fisher_oracle(model, params, batches)),
        (
            fisher_information(model, params, batches, kind="exact"),
            fisher_oracle(model, params, batches, exact=True),
        ),
        (output_sensitivity(model, params, batches), mas_oracle(model, params, batches)),
        (sliced_cramer_importance(model, params, batches), scp_oracle(model, params, batches)),
    ]
    for got, expected in estimates:
        assert_close(got, expected, rtol=1e-10)
        assert any(bool(entry.any()) for entry in got)


@pytest.mark.parametrize("name", RULED)
def test_layers_with_a_rule(name, device):
    torch.manual_seed(0)
    model = RULED[name]().to(device, torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        assert_all_estimates(model)


CHUNKED = [
    *("1d same", "1d circular", "2d groups", "2d depthwise", "2d called twice", "3d groups"),
    *("embedding with padding", "tied embedding"),
    *("batch norm 2d", "layer norm of two dimensions", "group norm", "instance norm"),
]


@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_of_any_size_give_the_same(name, monkeypatch):
    torch.manual_seed(0)
    model = RULED[name]().double()
    params, batches = params_of(model), batches_of()
    expected = output_sensitivity(model, params, batches)
    scratch = max(p.numel() for p in params) * 8
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 3 * scratch)
    assert_close(output_sensitivity(model, params, batches), expected, rtol=1e-12)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 0)
    assert_close(output_sensitivity(model, params, batches), expected, rtol=1e-12)


@pytest.mark.parametrize("samples", [1, 3])
def test_gradients_of_samples_are_made_within_a_bound(samples, monkeypatch):
    """Where a parameter has several uses, whose gradients are added before the function."""
    model = RULED["2d called twice"]().double()
    rule = rule_for(model.conv)
    windows = [rule.features(torch.zeros(1, 1, *shape)) for shape in ((2, 3, 4), (2, 4, 5))]
    single = model.conv.weight.numel()
    assert [entry.numel() for entry in windows] == [8 * 4 * 5, 8 * 5 * 6]
    assert rule.scratch("weight", windows[0]) == 8 * 4 * 5 + 2 * single
    each = 8 * sum(rule.scratch("weight", entry) for entry in windows)
    made = []
    plain = type(rule).gradient

    def gradient(self, name, features, g):
        made.append((name, len(g)))
        return plain(self, name, features, g)

    monkeypatch.setattr(type(rule), "gradient", gradient)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", samples * each)
    fisher_information(model, params_of(model), batches_of((8,)))
    assert max(n for name, n in made if name == "weight") == samples


@pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")
@pytest.mark.parametrize("name", FALLBACK)
def test_layers_without_a_rule(name, device):
    torch.manual_seed(0)
    model = FALLBACK[name][0]().to(device, torch.float64)
    assert_all_estimates(model)


HALF = [
    *("2d", "batch-first", "embedding", "batch norm 2d", "layer norm", "RMS norm", "group norm"),
    *("transformer", "LSTM", "norms with a forward of their own", "parameters by themselves"),
    *("weight norm", "relative positions"),
]


@pytest.mark.parametrize("name", HALF)
def test_half_precision_models_get_float32_importances(name, device):
    torch.manual_seed(0)
    model = RULED[name]().to(device, torch.float32)
    params, batches = params_of(model), batches_of(dtype=torch.float32)
    expected = fisher_information(model, params, batches)
    model.to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        got = fisher_information(
            model,
            params,
            [(x.to(torch.bfloat16) if name != "embedding" else x, y) for x, y in batches],
        )
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.1 * theirs.norm()


# ------------------------------------------------------------------ random models

CHANNELS, LENGTH = 4, 6


def _turned(order):
    """Layers over the last dimension, with the samples elsewhere."""

    def wrap(layer):
        def forward(m, x):
            if order == "sequence-first":
                return m.layer(x.transpose(0, 1)).transpose(0, 1)
            if order == "sample-major":
                return m.layer(x.reshape(-1, LENGTH)).view(x.shape)
            if order == "time-major":
                turned = x.transpose(0, 1)
                return m.layer(turned.reshape(-1, LENGTH)).view(turned.shape).transpose(0, 1)
            return m.layer(x)

        return Custom(forward, layer=layer)

    return wrap


class Chain(nn.Module):
    """Layers [samples, CHANNELS, LENGTH] to the same shape, some of them more than once."""

    def __init__(self, layers, order, residual):
        super().__init__()
        self.layers, self.order, self.residual = nn.ModuleList(layers), order, residual
        for layer in self.layers:  # a Custom's head is for the end
            if isinstance(layer, Custom):
                layer.head = nn.Identity()
        self.head = nn.Linear(LENGTH, CLASSES)

    def forward(self, x):
        x = x.view(-1, CHANNELS, LENGTH)
        for i in self.order:
            new = self.layers[i % len(self.layers)](x).tanh()
            x = x + new if self.residual else new
        return self.head(x.mean(1))


def _convolution(options):
    kernel, dilation, groups, mode, bias = options
    return nn.Conv1d(
        CHANNELS,
        CHANNELS,
        kernel,
        padding="same",
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
        bias=bias,
    )


turns = st.sampled_from(["batch-first", "sequence-first", "sample-major", "time-major"])
some_layers = st.one_of(
    st.tuples(
        st.integers(1, 3),
        st.integers(1, 2),
        st.sampled_from([1, 2, 4]),
        st.sampled_from(["zeros", "circular", "replicate"]),
        st.booleans(),
    ).map(_convolution),
    st.tuples(turns, st.booleans()).map(
        lambda t: _turned(t[0])(nn.Linear(LENGTH, LENGTH, bias=t[1]))
    ),
    turns.map(lambda t: _turned(t)(nn.LayerNorm(LENGTH))),
    st.sampled_from([1, 2, 4]).map(lambda groups: nn.GroupNorm(groups, CHANNELS)),
    st.just(CHANNELS).map(nn.BatchNorm1d),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(some_layers, min_size=1, max_size=3),
    st.lists(st.integers(0, 2), min_size=1, max_size=4),
    st.booleans(),
    st.lists(st.integers(1, 9), min_size=1, max_size=2),
    st.integers(0, 2**16),
)
def test_random_models(layers, order, residual, sizes, seed):
    torch.manual_seed(seed)
    model = Chain(layers, order, residual).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    params, batches = params_of(model), batches_of(sizes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        for estimate, oracle in (
            (fisher_information, fisher_oracle),
            (output_sensitivity, mas_oracle),
            (sliced_cramer_importance, scp_oracle),
        ):
            got = estimate(model, params, batches)
            assert_close(got, oracle(model, params, batches), rtol=1e-10)
