"""Rules of autograd's nodes: what is asked for, once or each time, and what stays open."""

from __future__ import annotations

import warnings

import pytest
import torch
from importance_models import CLASSES, make_batches, params_of
from importance_oracle import assert_close, fisher_oracle, mas_oracle
from layer_models import BY_GRAPH, VOCABULARY, Custom, sequences, tokens
from torch import nn

from clext.importance import (
    LayerRule,
    SlowImportanceWarning,
    fisher_information,
    output_sensitivity,
    register_rule,
)
from clext.importance.coverage import CoverageFinder
from clext.importance.rules import RULES
from clext.importance.rules.products import LinearRule

fast = pytest.mark.filterwarnings("error::clext.importance.SlowImportanceWarning")


@pytest.fixture
def probed(monkeypatch):
    """The number of samples of each pass that is probed."""
    found = []
    plain = CoverageFinder._probe

    def probe(self, outputs, *args):
        found.append(len(outputs))
        return plain(self, outputs, *args)

    monkeypatch.setattr(CoverageFinder, "_probe", probe)
    return found


def batches_of(*sizes, dtype=torch.float64):
    return make_batches(sizes, features=24, dtype=dtype)


# In these each batch may arrange the rows of its samples in another way.
ANEW = ("packed", "bags")
ONCE = [name for name in BY_GRAPH if not any(word in name for word in ANEW)]


@fast
@pytest.mark.parametrize("name", ONCE)
def test_a_kind_of_pass_is_probed_once(name, probed):
    torch.manual_seed(0)
    model = BY_GRAPH[name]().double()
    fisher_information(model, params_of(model), batches_of(*[5] * 6))
    assert len(probed) <= 2  # by the layers, and once more by the graph


class Classifier(nn.Module):
    """The outputs at each sample's last token, of which there are as many as samples."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(VOCABULARY, 5), nn.Linear(5, CLASSES)
        self.scale = nn.Parameter(torch.randn(5))

    def forward(self, x):
        words = tokens(x)
        last = (words > 1).sum(1).clamp(max=words.shape[1] - 1)
        outputs = self.layer(self.table(words) * self.scale)
        return outputs[torch.arange(len(x), device=x.device), last]


@fast
@pytest.mark.parametrize("features", [6, 12])
def test_an_index_of_tokens_is_probed_once_though_it_may_be_one_of_samples(features, probed):
    model = Classifier().double()
    params, batches = params_of(model), make_batches((6,) * 4, features=features)
    got = fisher_information(model, params, batches)
    assert_close(got, fisher_oracle(model, params, batches))
    assert len(probed) == 1


@fast
def test_sequences_of_other_lengths_are_of_one_kind(probed):
    """But for those that have as many tokens as there are samples."""

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.places = nn.Embedding(VOCABULARY, 5), nn.Embedding(40, 5)
            self.layer, self.head = nn.MultiheadAttention(5, 1), nn.Linear(5, CLASSES)

        def forward(self, x):
            words = tokens(x)
            place = torch.arange(words.shape[1], device=x.device)
            hidden = (self.table(words) + self.places(place)).transpose(0, 1)
            return self.head(self.layer(hidden, hidden, hidden)[0].mean(0))

    model = Text().double()
    params, batches = params_of(model), []
    for length in (5, 7, 9, 12, 7, 11):
        batches += make_batches((6,), features=length)
    for estimate, oracle in ((fisher_information, fisher_oracle), (output_sensitivity, mas_oracle)):
        probed.clear()
        assert_close(estimate(model, params, batches), oracle(model, params, batches))
        assert len(probed) <= 3


def test_a_parameter_without_a_gradient_at_first_is_looked_at_again(probed):
    """In the first batch nothing comes through the layers; in a later one there is a use of a
    weight that no rule knows.
    """

    def forward(m, x):
        hidden = m.second(m.first(x[:, :6]).relu())
        return torch.maximum(hidden, m.second.weight[0]) * m.gate(x[:, :6]).relu().sum(
            1, keepdim=True
        )

    model = Custom(
        forward, first=nn.Linear(6, 6), second=nn.Linear(6, 6), gate=nn.Linear(6, 6)
    ).double()
    with torch.no_grad():
        model.gate.weight.abs_()
        model.gate.bias.zero_()
    (x, y), *_ = batches_of(5)
    params = params_of(model)
    batches = [(sign * x.abs(), y) for sign in (-1, -1, 1, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowImportanceWarning)
        got = fisher_information(model, params, batches)
    assert_close(got, fisher_oracle(model, params, batches))
    assert len(probed) <= 2


def test_unused_parameters_cost_nothing(probed):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.pooler = nn.Linear(24, 5), nn.Linear(5, 5)
            self.head, self.mask = nn.Linear(5, CLASSES), nn.Parameter(torch.randn(5))

        def forward(self, x):
            hidden = self.layer(x).tanh()
            self.pooler(hidden)
            return self.head(hidden)

    model = Unused().double()
    params, batches = params_of(model), batches_of(4, 4, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowImportanceWarning)
        got = fisher_information(model, params, batches)
    assert_close(got, fisher_oracle(model, params, batches))
    assert len(probed) == 1


@fast
def test_parts_of_a_parameter_differ_from_batch_to_batch():
    """Positions up to the length; a prompt beside others, of which there are more or less."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(1, 5), nn.Linear(5, CLASSES)
            self.places = nn.Parameter(torch.randn(1, 12, 5))
            self.prompt, self.others = (nn.Parameter(torch.randn(n, 5)) for n in (2, 8))

        def forward(self, x):
            hidden = (self.layer(x.unsqueeze(2)) + self.places[:, : x.shape[1]]).tanh()
            prompts = torch.cat([self.others[: x.shape[1]], self.prompt])
            hidden = torch.cat([prompts.expand(len(x), -1, -1), hidden], 1)
            return self.head(hidden.cumsum(1).tanh().mean(1))

    model = Prompted().double()
    params, batches = params_of(model), []
    for length in (3, 6, 3, 5):
        batches += make_batches((4,), features=length)
    for estimate, oracle in ((fisher_information, fisher_oracle), (output_sensitivity, mas_oracle)):
        assert_close(estimate(model, params, batches), oracle(model, params, batches))


@fast
def test_nearly_sorted_packed_sequences():
    """Two samples that change places are told apart, whichever they are."""
    model = BY_GRAPH["RNN, packed"]().double()
    params = params_of(model)
    (x, y), *_ = batches_of(5)
    lengths = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0])  # one less
    for k in range(5):
        for other in range(k):
            order = torch.arange(5)
            order[[k, other]] = order[[other, k]]
            swapped = x.clone()
            swapped[:, 0] = (lengths[order] + 0.5) / 3
            batches = [(swapped, y)]
            got = output_sensitivity(model, params, batches)
            assert_close(got, mas_oracle(model, params, batches))


# ------------------------------------------------------------------ rules of one's own


class Doubled(nn.Module):
    """Twice a linear layer."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5))

    def forward(self, x):
        return torch.einsum("nti,oi->nto", 2 * x, self.weight) + 2 * self.bias


class DoubledRule(LayerRule):
    used = 0

    def row_dims(self, dims):  # noqa: ARG002
        return 1, 1

    def gradient(self, name, features, g):
        DoubledRule.used += 1
        return 2 * (g.sum(1) if name == "bias" else g.transpose(1, 2) @ features)


class WrongRule(DoubledRule):
    def features(self, inputs):
        return 3 * inputs


@pytest.fixture
def registered(monkeypatch):
    """What the test registers is forgotten after it."""
    for layer_type in list(RULES):
        monkeypatch.setitem(RULES, layer_type, RULES[layer_type])
    yield
    RULES.pop(Doubled, None)


@pytest.mark.parametrize("rule", [DoubledRule, WrongRule])
@pytest.mark.usefixtures("registered")
def test_rules_for_own_layers(rule):
    register_rule(Doubled, rule)
    model = Custom(lambda m, x: m.layer(sequences(m, x)), layer=Doubled()).double()
    params, batches = params_of(model), batches_of(4, 4, 4)
    DoubledRule.used = 0
    fisher_information(model, params, batches[:1])
    in_the_first = DoubledRule.used
    assert in_the_first > 0
    got = fisher_information(model, params, batches)
    assert_close(got, fisher_oracle(model, params, batches))
    # A wrong one is asked no more, at most for what it has right: the bias.
    later = DoubledRule.used - 2 * in_the_first
    assert later == (4 if rule is DoubledRule else 2)


@pytest.mark.parametrize(
    ("layer_type", "rule", "message"),
    [
        (nn.Linear(2, 2), LinearRule, "layer_type must be a subclass of Module, got Linear"),
        (nn.Linear, LinearRule(nn.Linear(2, 2)), "rule must be a subclass of LayerRule, got <"),
        (nn.Linear, nn.Linear, "rule must be a subclass of LayerRule"),
        (LayerRule, LinearRule, "layer_type must be a subclass of Module"),
    ],
)
def test_what_is_no_rule_is_refused(layer_type, rule, message):
    with pytest.raises(ValueError, match=message):
        register_rule(layer_type, rule)
