"""Each layer rule against plain loops over samples, and who is left to torch.func."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_models import CLASSES, params_of
from importance_oracle import assert_close, fisher_oracle, mas_oracle, scp_oracle
from layer_models import CONVOLUTIONS, EMBEDDINGS, FALLBACK, NORMS, RULED, Custom
from torch import nn

from clext.importance import (
    SlowImportanceWarning,
    fallback,
    fisher_information,
    layers,
    output_sensitivity,
    sliced_cramer_importance,
)


def batches_of(sizes=(4, 1, 5, 2), dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, 24, generator=generator).to(dtype),
            torch.randint(CLASSES, (size,), generator=generator),
        )
        for size in sizes
    ]


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


@pytest.mark.parametrize("name", [*CONVOLUTIONS, *EMBEDDINGS, *NORMS])
def test_chunks_of_any_size_give_the_same(name, monkeypatch):
    torch.manual_seed(0)
    model = RULED[name]().double()
    params, batches = params_of(model), batches_of()
    expected = output_sensitivity(model, params, batches)
    scratch = max(p.numel() for p in params) * 8
    monkeypatch.setitem(layers.CHUNK_BYTES, "cpu", 3 * scratch)
    assert_close(output_sensitivity(model, params, batches), expected, rtol=1e-12)
    monkeypatch.setitem(layers.CHUNK_BYTES, "cpu", 0)
    assert_close(output_sensitivity(model, params, batches), expected, rtol=1e-12)


@pytest.fixture
def left_over(monkeypatch):
    """The parameters that torch.func is asked for."""
    asked = []
    plain = fallback.SingleSamples.add

    def add(self, x, cotangent, chosen):
        asked.extend(self._params[i] for i in chosen)
        plain(self, x, cotangent, chosen)

    monkeypatch.setattr(fallback.SingleSamples, "add", add)
    return asked


@pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")
@pytest.mark.parametrize("name", FALLBACK)
def test_only_what_has_no_rule_is_left_to_torch_func(name, device, left_over):
    torch.manual_seed(0)
    make, prefixes = FALLBACK[name]
    model = make().to(device, torch.float64)
    assert_all_estimates(model)
    asked = {id(entry) for entry in left_over}
    for parameter_name, parameter in model.named_parameters():
        ruled = not parameter_name.startswith(tuple(prefixes))
        assert (id(parameter) in asked) != ruled, parameter_name
