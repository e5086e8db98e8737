"""What is left to torch.func: said once, in chunks, batch by batch."""

from __future__ import annotations

import warnings

import pytest
import torch
from importance_models import (
    Prototypes,
    SelfChecking,
    make_batches,
    params_of,
)
from importance_oracle import assert_close, fisher_oracle, mas_oracle
from layer_models import FALLBACK, Custom
from torch import nn

from clext.importance import (
    SlowImportanceWarning,
    fallback,
    fisher_information,
    output_sensitivity,
)

slow = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (SelfChecking, "'layer.weight' (Bilinear)"),
        (Prototypes, "'prototypes' (Prototypes)"),
    ],
)
def test_parameters_without_a_rule_are_announced_once(make, named):
    model = make().double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            fisher_information(model, params_of(model), make_batches())
    said = [str(w.message) for w in caught if issubclass(w.category, SlowImportanceWarning)]
    assert len(said) == 1
    assert f"importance of {make.__name__} " in said[0]
    assert f"for {named}: " in said[0]


@slow
def test_torch_func_is_chunked_to_a_bound(device, monkeypatch):
    model = Prototypes().to(device, torch.float64)
    params, batches = params_of(model), make_batches()
    expected = fisher_oracle(model, params, batches)
    sample_bytes = model.prototypes.numel() * model.prototypes.element_size()
    monkeypatch.setattr(fallback, "_CHUNK_BYTES", 2 * sample_bytes)
    held = []
    monkeypatch.setattr(torch, "square", lambda g: held.append(len(g)) or g * g)
    assert_close(fisher_information(model, params, batches), expected)
    assert max(n for n in held if n <= 2) == 2


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


@slow
@pytest.mark.parametrize("name", FALLBACK)
def test_only_what_has_no_rule_is_left_to_torch_func(name, device, left_over):
    """Estimates: see test_rules.py."""
    torch.manual_seed(0)
    make, prefixes = FALLBACK[name]
    model = make().to(device, torch.float64)
    fisher_information(model, params_of(model), make_batches((4, 1), features=24))
    asked = {id(entry) for entry in left_over}
    for parameter_name, parameter in model.named_parameters():
        without_rule = parameter_name.startswith(tuple(prefixes))
        assert (id(parameter) in asked) == without_rule, parameter_name


@slow
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_layers_beside_batch_statistics_are_left_to_torch_func(first, left_over):
    """What one sample becomes there depends on the others, also of layers that come later."""
    norm = nn.BatchNorm1d(4, affine=False, track_running_stats=False)

    def forward(m, x):
        x = x.view(-1, 4, 6)
        return m.layer(norm(x)) if first else norm(m.layer(x))

    model = Custom(forward, layer=nn.Linear(6, 6)).double()
    params, batches = params_of(model), make_batches((4, 2), features=24)
    assert_close(fisher_information(model, params, batches), fisher_oracle(model, params, batches))
    assert any(entry is model.layer.weight for entry in left_over)


@slow
@pytest.mark.parametrize("sizes", [(2,), (4,), (9,)])
def test_samples_in_another_order_are_noticed(sizes, left_over):
    model = Custom(lambda m, x: m.layer(x.flip(0)).flip(0), layer=nn.Linear(24, 6)).double()
    params, batches = params_of(model), make_batches(sizes, features=24)
    assert_close(output_sensitivity(model, params, batches), mas_oracle(model, params, batches))
    assert {id(entry) for entry in left_over} == {id(entry) for entry in model.layer.parameters()}
