"""Coverage by the rules: models that do what no hook sees, or mix samples, against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from importance_models import CLASSES, make_batches, params_of
from importance_oracle import (
    assert_close,
    fisher_oracle,
    gradients_of,
    mas_oracle,
    mean,
    scp_oracle,
)
from layer_models import Custom
from torch import nn

from clext.importance import (
    fisher_information,
    output_sensitivity,
    sliced_cramer_importance,
)

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")


class Model(nn.Module):
    """`function` of the model and its input, with two layers and a head."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.scale = nn.PReLU()
        self.held = [self.b.weight]

    def forward(self, x):
        return self.head(self.function(self, x))


class Sparing(nn.Module):
    """`model` without an effect on the input."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x.clone())


def masked():
    model = Model(lambda m, x: m.a(x).tanh())
    mask = (torch.arange(36) % 2).view(6, 6)
    model.a.weight.register_hook(lambda g: g * mask)
    return model


def closed_over():
    weight = None
    model = Model(lambda m, x: F.linear(m.scale(m.a(x)), weight))
    weight = model.b.weight
    return model


def ragged(m, x):
    kept = x > 0
    rows = m.a(torch.diag_embed(x)[kept]).tanh()
    hidden = x.new_zeros(*x.shape, 6)
    hidden[kept] = rows
    return hidden.sum(1)


def sorted_rows(m, x):
    order = x[:, 0].argsort()
    return m.a(x[order])[order.argsort()] * m.a(x.roll(1, 1))


def with_other_weight(m, x):
    other = {"weight": m.b.weight * 2, "bias": m.a.bias}
    return torch.func.functional_call(m.a, other, (x,))


def recurrent_over_batch(m, x):
    return m.a(x).tanh().cumsum(0)


def in_parts(m, x):
    return torch.cat([m.a(part) for part in x.split(20)]).tanh()


def samples_second(m, x):
    """As many tokens as samples, in one of the cases."""
    tokens = x.repeat(40, 1, 1)
    tokens = tokens * torch.linspace(0.5, 2, 40).to(x)[:, None, None]
    return m.a(tokens).tanh().sum(0)


def flipped(m, x):
    """In many samples only."""
    rows = m.a(x if len(x) <= 16 else torch.cat([x.flip(0), x]))
    return rows[: len(x)].flip(0) if len(x) > 16 else rows


def every_other(m, x):
    """A use of some samples only, beside the layer's own."""
    hidden = m.a(x).tanh()
    return torch.where(x[:, 1:2] > x[:, :1], F.linear(hidden, m.a.weight), hidden)


def sorted_pairs(m, x):
    """Both halves of a sample, each in an order of its own."""
    first, second = x[:, 0].argsort(), x[:, 1].argsort()
    left = m.a(x[first])[first.argsort()]
    return left * m.b(x[second])[second.argsort()]


MODELS = {
    "held in a list": lambda: Model(lambda m, x: F.linear(m.scale(m.a(x)), m.held[0])),
    "held by a closure": closed_over,
    "hook on a parameter": masked,
    "another weight": lambda: Model(with_other_weight),
    "ragged rows": lambda: Model(ragged),
    "gate": lambda: Model(lambda m, x: m.a(x) + (x[:, :1] > 0) * F.linear(x, m.a.weight)),
    "sorted": lambda: Model(sorted_rows),
    "causal over the batch": lambda: Model(recurrent_over_batch),
    "mixed, far from zero": lambda: Model(lambda m, x: m.a(x) + 1e9 + 1e-2 * x.cumsum(0)),
    "in parts": lambda: Model(in_parts),
    "samples in the second dimension": lambda: Model(samples_second),
    "flipped": lambda: Model(flipped),
    "every other": lambda: Model(every_other),
    "sorted pairs": lambda: Model(sorted_pairs),
    "changes its input": lambda: Model(lambda m, x: m.a(x.sub_(0.5)).tanh()),
    "changes its input, slow": lambda: Model(lambda m, x: m.scale(m.a(x.mul_(2)))),
}


def ordered_batches(sizes):
    """Samples of which the first four are ascending and negative in the first entry."""
    (x, y), *others = make_batches(sizes)
    x[:4, 0] = torch.tensor([-4.0, -3.5, -3.0, -2.5])
    x[4:9, 0] = torch.tensor([2.0, 1.0, 3.0, 1.5, 0.5])
    return [(x, y), *others]


@pytest.mark.parametrize("sizes", [(9, 9, 5), (40, 40, 33)])
@pytest.mark.parametrize("name", MODELS)
def test_what_no_hook_sees_counts(name, sizes):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    params, batches = params_of(model), ordered_batches(sizes)
    copies = [(x.clone(), y) for x, y in batches]
    for estimate, oracle in (
        (fisher_information, fisher_oracle),
        (output_sensitivity, mas_oracle),
        (sliced_cramer_importance, scp_oracle),
    ):
        got = estimate(model, params, batches)
        for (x, _), (before, _) in zip(batches, copies, strict=True):
            assert torch.equal(x, before)
        expected = oracle(Sparing(model), params, batches)
        rtol = 1e-5 if name == "mixed, far from zero" else 1e-9
        assert_close(got, expected, rtol=rtol)


def test_a_model_for_one_size_of_batches(device):
    model = Custom(lambda m, x: m.layer(x.view(5, 4, 6)), layer=nn.Linear(6, 5))
    model.to(device, torch.float64)
    params, batches = params_of(model), make_batches((5, 5), features=24)
    got = output_sensitivity(model, params, batches)
    model.function = lambda m, x: m.layer(x.view(-1, 4, 6))
    assert_close(got, mas_oracle(model, params, batches))


def test_samples_run_twice_at_most():
    """To be measured, and those of the first batch to see that they do not mix."""
    ran = []
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    params, batches = params_of(model), make_batches((100, 100), dtype=torch.float32)
    fisher_information(model, params, batches)
    assert sum(ran) == 2 * 100 + 100


class Padded(nn.Module):
    """Text of which some is shorter: without gradients, torch's encoder calculates otherwise."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        hidden = self.encoder(self.embedding(x), src_key_padding_mask=x == 0)
        return self.head(hidden.mean(1))


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_padded_text(trainable):
    torch.manual_seed(0)
    model = Padded().double()
    x = torch.randint(1, 12, (20, 6), generator=torch.Generator().manual_seed(1))
    x[::3, 4:] = 0
    batches = [(x, torch.arange(20) % CLASSES)]
    params = params_of(model if trainable == "all" else model.head)
    for estimate, oracle in ((fisher_information, fisher_oracle), (output_sensitivity, mas_oracle)):
        assert_close(estimate(model, params, batches), oracle(model, params, batches))


def by_product(m, x):
    """A row for each positive entry; how they make up samples is in no operation with an index."""
    kept = x > 0
    rows = m.a(torch.diag_embed(x)[kept]).tanh()
    return F.one_hot(kept.nonzero()[:, 0], len(x)).to(x).T @ rows


def on_a_grid(m, x):
    """As many tokens as samples; with negative entries, a sample has one of its own place alone."""
    rows = m.a(x.repeat(len(x), 1, 1)).tanh()
    weights = torch.where(x[:, 0] > 0, 1.0, torch.eye(len(x)).to(x))
    return (rows * (weights / weights.sum(0)).unsqueeze(2)).sum(0)


def lent(m, x):
    """The layer's own weight where the first entries are positive."""
    return m.a(x) if bool((x[:, 0] > 0).all()) else with_other_weight(m, x)


def positive(*counts):
    """Samples with so many positive entries, the first ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(len(counts), 6, dtype=torch.float64, generator=generator) + 0.1
    return torch.where(torch.arange(6) < torch.tensor(counts)[:, None], x, -x)


@pytest.mark.parametrize(
    ("use", "first", "second"),
    [
        (ragged, [3] * 8, [3, 3, 3, 3, 2, 4, 2, 4]),
        (by_product, [3] * 8, [3, 3, 3, 3, 2, 4, 2, 4]),
        (by_product, [1] * 8, [2, 2, 3, 3, 2, 1, 2, 1]),
        (on_a_grid, [0] * 8, [6] * 8),
        (lent, [0] * 8, [6] * 8),
    ],
)
def test_what_one_batch_shows_is_not_taken_for_all(use, first, second):
    """The second batch has as many samples, and but for one case as many rows of each layer."""
    torch.manual_seed(0)
    model = Model(use).double()
    y = torch.arange(8) % CLASSES
    params, batches = params_of(model), [(positive(*first), y), (positive(*second), y)]
    assert_close(fisher_information(model, params, batches), fisher_oracle(model, params, batches))


def by_index(m, h, order):
    return m.a(h[order])[order.argsort()]


def by_gather(m, h, order):
    index = order.unsqueeze(1).expand_as(h)
    return torch.zeros_like(h).scatter(0, index, m.a(h.gather(-2, index)))


def by_selection(m, h, order):
    return torch.zeros_like(h).index_add(0, order, m.a(h.index_select(0, order)))


def by_assignment(m, h, order):
    sorted_back = torch.zeros_like(h)
    sorted_back[order] = m.a(h[order])
    return sorted_back


@pytest.mark.parametrize("use", [by_index, by_gather, by_selection, by_assignment])
def test_an_order_that_the_data_decide_is_not_remembered(use):
    """In the first batch it is the samples' own."""
    torch.manual_seed(0)
    model = Model(lambda m, x: m.a(x) + use(m, m.a(x).tanh(), x[:, 0].argsort())).double()
    x = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ascending = x[x[:, 0].argsort()]
    y = torch.arange(6) % CLASSES
    params, batches = params_of(model), [(ascending, y), (ascending.flip(0), y)]
    for estimate, oracle in ((fisher_information, fisher_oracle), (output_sensitivity, mas_oracle)):
        got = estimate(model, params, batches)
        assert_close(got, oracle(model, params, batches))


def last_tokens(m, x):
    h = m.a(x.unsqueeze(1) * torch.linspace(0.5, 2, 4).to(x)[:, None]).tanh()
    return h[torch.arange(len(x)), (x[:, 0] > 0).long()].sort(1)[0].gather(1, (x > 0).long())


def test_an_index_within_samples_is_not_looked_at_again():
    ran = []
    model = Model(last_tokens)
    model.register_forward_pre_hook(lambda _, args: ran.append(len(args[0])))
    params = [*model.a.parameters(), *model.head.parameters()]
    fisher_information(model, params, make_batches((20, 20), dtype=torch.float32))
    assert sum(ran) == 2 * 20 + 20


def test_a_small_hidden_use_beside_what_cancels():
    def forward(m, x):
        hidden = m.a(x)
        return hidden - hidden.mean(1, keepdim=True) + 0.03 * m.a.bias * torch.ones_like(x)

    torch.manual_seed(0)
    model = Model(forward)
    params, batches = params_of(model), make_batches((8,), dtype=torch.float32)
    got = output_sensitivity(model, params, batches)
    assert_close(got, mas_oracle(model, params, batches), rtol=1e-3)


def test_statistics_of_the_batch_alone_are_described():
    norm = nn.BatchNorm1d(6, track_running_stats=False)
    model = nn.Sequential(norm, nn.Linear(6, CLASSES)).double()
    with pytest.raises(ValueError, match="it mixes the samples of a batch"):
        fisher_information(model, params_of(model), make_batches((4,)))


def test_a_call_whose_result_is_not_used_does_no_harm():
    def forward(m, x):
        m.b(x.view(-1, 6)[:7])
        return m.a(x)

    model = Model(forward).double()
    params, batches = params_of(model), make_batches((9, 3))
    got = output_sensitivity(model, params, batches)
    assert not got[2].any()
    assert_close(got, mas_oracle(model, params, batches))


def test_a_batch_without_gradient_settles_nothing():
    """The weight's second use, which no hook sees, shows in the second batch alone."""

    def forward(m, x):
        hidden = m.a(x).relu()
        return hidden * F.linear(hidden, m.a.weight)

    model = Model(forward).double()
    with torch.no_grad():
        model.a.weight.abs_()
    (first, y), *others = make_batches((4, 4))
    batches = [(-first.abs() - 1, y), *((x.abs() + 1, y) for x, y in others)]
    params = params_of(model)
    assert_close(fisher_information(model, params, batches), fisher_oracle(model, params, batches))


def test_rule_gives_way_where_a_later_batch_breaks_it(device):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            hidden = self.layer(x).tanh()
            return self.head(self.layer(hidden) if x[0, 0] > 5 else hidden)

    model = Changing().to(device, torch.float64)
    params, batches = params_of(model), make_batches((4, 4))
    batches[1][0][:, 0] += 10
    expected = []
    model.eval()
    for x, y in batches:
        for n in range(len(x)):
            hidden = model.layer(x[n : n + 1].to(params[0].device)).tanh()
            hidden = model.layer(hidden) if x[n, 0] > 5 else hidden
            log_p = model.head(hidden).log_softmax(1)[0, int(y[n])]
            expected.append([g.square() for g in gradients_of(log_p, params)])
    assert_close(fisher_information(model, params, batches), mean(expected))


class Changing(nn.Module):
    """A layer that is used in another way too where the inputs are long, or mixes samples there."""

    def __init__(self, *, mixes):
        super().__init__()
        self.e, self.o, self.mixes = nn.Linear(5, 5), nn.Linear(5, CLASSES), mixes

    def forward(self, x):
        h = self.e(x).tanh()
        if x.shape[1] > 6:
            more = h.mean(0, keepdim=True) if self.mixes else F.linear(x.roll(1, 1), self.e.weight)
            h = h + more
        return self.o(h.mean(1))


@pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")
@pytest.mark.parametrize("mixes", [False, True])
def test_a_pass_that_does_something_else_is_of_another_kind(mixes):
    torch.manual_seed(0)
    model = Changing(mixes=mixes).double()
    batches = [(torch.randn(4, n, 5).double(), torch.randint(CLASSES, (4,))) for n in (5, 7, 5)]
    params = list(model.parameters())
    found = fisher_information(model, params, batches)
    expected = [torch.zeros_like(p) for p in params]
    for x, y in batches:
        for sample, label in zip(x.split(1), y.split(1), strict=True):
            gradients = torch.autograd.grad(F.cross_entropy(model(sample), label), params)
            torch._foreach_add_(expected, [g.square() / 12 for g in gradients])
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-14)


def test_a_backward_pass_of_the_models_own_is_refused():
    """As of checkpointing by other means than torch's; gradients are put back."""

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, layer):
            ctx.layer = layer
            ctx.save_for_backward(x)
            with torch.no_grad():
                return layer(x)

        @staticmethod
        def backward(ctx, g):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                torch.autograd.backward(ctx.layer(x), g)
            return x.grad, None

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.c(Hidden.apply(self.a(x), self.b))

    model = Own()
    kept = model.b.weight.grad = torch.ones(6, 6)
    with pytest.raises(ValueError, match="backward pass of its own, .* checkpointing off"):
        fisher_information(
            model, list(model.parameters()), [(torch.randn(4, 6), torch.zeros(4).long())]
        )
    assert model.b.weight.grad is kept
    assert torch.equal(kept, torch.ones(6, 6))
