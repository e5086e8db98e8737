"""Kronecker factors of the Fisher information against their definition, row by row in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clext import Supervision
from clext.importance import fisher_information, kronecker_factors

CLASSES = 3


def as_float64(seed, *layers):
    torch.manual_seed(seed)
    return nn.Sequential(*layers).double().eval()


def images(channels=2, size=5, count=6, dims=2):
    random = torch.Generator().manual_seed(7)
    x = torch.randn(count, channels, *[size] * dims, generator=random, dtype=torch.float64)
    return x, torch.randint(CLASSES, (count,), generator=random)


def scores(logits, label, kind):
    """Weight and gradient by the logits [C] of log p(label), for each label that counts."""
    for k in range(CLASSES) if kind == "exact" else [int(label)]:
        own = logits.detach().requires_grad_()
        log_p = (-own if kind == "reversed" else own).log_softmax(0)[k]
        (gradient,) = torch.autograd.grad(log_p, own)
        yield float(log_p.detach().exp()) if kind == "exact" else 1.0, gradient


def windows(layer, x):
    """Inputs of one sample in rows: [rows, in]."""
    if isinstance(layer, nn.Linear):
        return x.flatten(0, -2)
    kernel = layer.kernel_size
    if layer.padding_mode != "zeros":
        x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)
        padding = [0] * len(kernel)
    else:
        padding = list(layer.padding)
    if len(kernel) == 1:  # unfold knows images alone
        x, kernel, padding = x.unsqueeze(2), (1, *kernel), [0, *padding]
        options = {"dilation": (1, *layer.dilation), "stride": (1, *layer.stride)}
    else:
        options = {"dilation": layer.dilation, "stride": layer.stride}
    return F.unfold(x, kernel, padding=padding, **options)[0].T


def oracle(model, layer, x, y, kind="empirical"):
    """The two factors of one layer: its inputs and output gradients are caught by hooks."""
    inputs, outputs = 0.0, 0.0
    for n in range(len(x)):
        caught = []

        def catch(_, args, output, caught=caught):
            caught.append((args[0], output))

        handle = layer.register_forward_hook(catch)
        logits = model(x[n : n + 1])
        handle.remove()
        rows = torch.cat([windows(layer, given) for given, _ in caught]).detach()
        ones = rows.new_ones(len(rows), 1) * float(layer.bias is not None)
        for row in torch.cat([ones, rows], 1):
            inputs = inputs + torch.outer(row, row) / len(x)
        for weight, score in scores(logits[0], y[n], kind):
            total = (logits[0] * score).sum()
            found = torch.autograd.grad(total, [out for _, out in caught], retain_graph=True)
            is_linear = isinstance(layer, nn.Linear)
            columns = torch.cat(
                [g.flatten(0, -2).T if is_linear else g[0].flatten(1) for g in found], 1
            )
            for g in columns.T:
                outputs = outputs + weight * torch.outer(g, g) / len(x) / len(rows)
    return inputs, outputs


def measured(model, x, y, **options):
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    factors, diagonal = kronecker_factors(
        model, params, [(x[:4], y[:4]), (x[4:], y[4:])], **options
    )
    return {names[i]: pair for i, pair in factors.items()}, dict(zip(names, diagonal, strict=True))


class Rows(nn.Module):
    """Tokens, each through the same layers; then their mean."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x.mean(1)


def sequences():
    random = torch.Generator().manual_seed(3)
    x = torch.randn(6, 4, 5, generator=random, dtype=torch.float64)
    return x, torch.randint(CLASSES, (6,), generator=random)


def check(model, x, y, kind="empirical"):
    found, diagonal = measured(model, x, y, kind=kind)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            for got, expected in zip(
                found.pop(f"{name}.weight"), oracle(model, layer, x, y, kind), strict=True
            ):
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert not found
    assert not any(bool(entry.any()) for entry in diagonal.values())


@pytest.mark.parametrize("kind", ["empirical", "exact", "reversed"])
def test_linear_layers_by_their_definition(kind):
    x = images(5, 1)[0].flatten(1)
    model = as_float64(0, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES, bias=False))
    check(model, x, images()[1], kind)


def test_a_layer_with_several_rows_a_sample():
    check(Rows(nn.Linear(5, 4), nn.Linear(4, CLASSES)).double().eval(), *sequences())


def test_a_layer_that_is_called_again_has_more_rows():
    layer = nn.Linear(5, 5)
    check(Rows(layer, layer, nn.Linear(5, CLASSES)).double().eval(), *sequences())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"padding": 1, "stride": 2},
        {"padding": 2, "dilation": 2, "bias": False},
        {"padding": 1, "padding_mode": "circular"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dims", [1, 2])
def test_convolutions_by_their_windows(options, dims):
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1](2, 4, 3, **options)
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)[dims - 1](1)
    model = as_float64(1, conv, nn.Tanh(), pool, nn.Flatten(), nn.Linear(4, CLASSES))
    check(model, *images(dims=dims))


def test_of_one_sample_with_one_row_the_product_is_the_fisher_information():
    x, y = images(5, 1)[0].flatten(1)[:1], images()[1][:1]
    model = as_float64(2, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    params = list(model.parameters())
    factors, _ = kronecker_factors(model, params, [(x, y)], kind="empirical")
    loss = F.cross_entropy(model(x), y)
    for layer, i in ((model[0], 0), (model[2], 2)):
        by_weight, by_bias = torch.autograd.grad(
            loss, [layer.weight, layer.bias], retain_graph=True
        )
        gradient = torch.cat([by_bias.unsqueeze(1), by_weight], 1).flatten()
        product = torch.kron(factors[i].outputs, factors[i].inputs)
        torch.testing.assert_close(product, torch.outer(gradient, gradient))


def test_drawn_labels_approach_the_expectation_and_follow_the_seed():
    x, y = images(5, 1)[0].flatten(1), images()[1]
    model = as_float64(3, nn.Linear(5, CLASSES))
    many = [(x, y)] * 2000
    params = list(model.parameters())
    exact, _ = kronecker_factors(model, params, many[:1], kind="exact")
    drawn, _ = kronecker_factors(model, params, many, seed=1)
    torch.testing.assert_close(drawn[0].inputs, exact[0].inputs)
    torch.testing.assert_close(drawn[0].outputs, exact[0].outputs, rtol=0.1, atol=0.005)
    again, _ = kronecker_factors(model, params, many[:3], seed=5)
    same, _ = kronecker_factors(model, params, many[:3], seed=5)
    other, _ = kronecker_factors(model, params, many[:3], seed=6)
    assert torch.equal(again[0].outputs, same[0].outputs)
    assert not torch.equal(again[0].outputs, other[0].outputs)


class Mixture(nn.Module):
    """Some layers with factors, and all kinds of parameters that have none."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.first = nn.Linear(8, 8)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.table.weight
        self.frozen = nn.Linear(8, 8)
        self.frozen.weight.requires_grad_(False)
        self.head = nn.Linear(8, CLASSES)
        self.head.bias.requires_grad_(False)
        self.used_elsewhere = nn.Linear(8, 8)

    def forward(self, tokens):
        x = self.table(tokens) * self.scale
        x = x + self.attention(x, x, x)[0]
        x = self.norm(x + self.tied(x).tanh() @ self.table.weight)
        x = self.grouped(x.transpose(1, 2)).transpose(1, 2)
        x = self.frozen(self.first(x).tanh())
        x = self.used_elsewhere(x) @ self.used_elsewhere.weight.T
        return self.head(x.mean(1))


def test_what_no_such_layer_alone_uses_has_the_diagonal():
    torch.manual_seed(4)
    model = Mixture().double()
    x, y = torch.randint(11, (6, 4)), torch.randint(CLASSES, (6,))
    found, diagonal = measured(model, x, y, kind="exact")
    assert sorted(found) == ["first.weight", "head.weight"]
    assert not found["head.weight"].inputs[0].any(), "its bias is frozen"
    params = list(model.parameters())
    fisher = fisher_information(model, params, [(x, y)], kind="exact")
    for (name, parameter), expected in zip(model.named_parameters(), fisher, strict=True):
        factored = name in ("first.weight", "first.bias", "head.weight")
        expected = torch.zeros_like(expected) if factored else expected
        assert factored or not parameter.requires_grad or bool(expected.any()), name
        torch.testing.assert_close(diagonal[name], expected, msg=name)


def test_layers_that_share_a_weight_have_the_diagonal():
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    model = Rows(first, second, nn.Linear(5, CLASSES)).double().eval()
    x, y = sequences()
    found, diagonal = measured(model, x, y, kind="exact")
    assert list(found) == ["layers.2.weight"]
    params = list(model.parameters())
    fisher = fisher_information(model, params, [(x, y)], kind="exact")
    for name, expected in zip(diagonal, fisher, strict=True):
        if not name.startswith("layers.2"):
            torch.testing.assert_close(diagonal[name], expected)


def test_the_model_and_its_gradients_stay_as_they_were():
    x, y = images()
    model = as_float64(
        5, nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, CLASSES)
    )
    model.train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {name: entry.clone() for name, entry in model.state_dict().items()}
    measured(model, x, y)
    assert model.training
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert all(torch.equal(before[name], entry) for name, entry in model.state_dict().items())


def test_a_batch_of_one_and_a_limit_of_samples():
    x, y = images(5, 1)[0].flatten(1), images()[1]
    model = as_float64(6, nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))
    params = list(model.parameters())
    singly = [(x[n : n + 1], y[n : n + 1]) for n in range(6)]
    together, _ = kronecker_factors(model, params, [(x[:5], y[:5])], kind="empirical")
    limited, _ = kronecker_factors(model, params, singly, kind="empirical", samples=5)
    for i, pair in together.items():
        for got, expected in zip(limited[i], pair, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("likelihood", "labels"), [("bernoulli", torch.rand(6, 2)), ("gaussian", torch.randn(6, 2))]
)
def test_other_likelihoods(likelihood, labels):
    x = images(5, 1)[0].flatten(1)
    model = as_float64(7, nn.Linear(5, 2))
    supervision = Supervision(model, likelihood=likelihood)
    params = list(model.parameters())
    batches = [(x, labels.double())]
    factors, _ = kronecker_factors(model, params, batches, kind="exact", supervision=supervision)
    # In the last layer the factor is the mean Fisher information of the outputs themselves.
    p = model(x).sigmoid()
    variance = (p * (1 - p)).mean(0) if likelihood == "bernoulli" else torch.ones(2).double()
    torch.testing.assert_close(factors[0].outputs, torch.diag(variance.detach()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "batch"},
            r"option 'kind' .* \(valid: 'sample', 'exact', 'empirical', 'rev",
        ),
        ({"seed": -1}, "seed must be an integer >= 0"),
    ],
    ids=str,
)
def test_options_that_there_are_not(options, message):
    model = as_float64(8, nn.Linear(5, CLASSES))
    with pytest.raises(ValueError, match=message):
        kronecker_factors(model, list(model.parameters()), [], **options)


def test_factors_that_overflow_are_refused():
    model = nn.Sequential(nn.Linear(2, CLASSES))
    x = torch.full((2, 2), 1e25)
    nn.init.zeros_(model[0].weight)
    with pytest.raises(ValueError, match="a factor is not finite"):
        kronecker_factors(model, list(model.parameters()), [(x, torch.tensor([0, 1]))])
