"""Captures of passes whose autograd graphs are out of the ordinary; what is given back of them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from importance_models import CLASSES, make_batches, params_of
from importance_oracle import assert_close, fisher_oracle, mas_oracle
from torch import nn
from torch.autograd import grad
from torch.multiprocessing.reductions import StorageWeakRef

from clext.importance import fisher_information, output_sensitivity
from clext.importance.capture import ends_of

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")


class Equilibrium(nn.Module):
    """A fixed point z = f(z, x) of two layers, differentiated implicitly (Bai et al. 2019,
    arXiv:1909.01377): a hook on z solves for the gradient by passes through f of its own.
    """

    def __init__(self):
        super().__init__()
        self.inputs, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def f(self, z, x):
        return torch.tanh(0.3 * self.outer(torch.tanh(0.3 * self.inner(z) + x)))

    def forward(self, x):
        x = self.inputs(x)
        with torch.no_grad():
            z = torch.zeros_like(x)
            for _ in range(30):
                z = self.f(z, x)
        z = self.f(z, x)
        start = z.detach().requires_grad_()
        end = self.f(start, x)

        def solve(g):
            solution = g
            for _ in range(30):
                solution = grad(end, start, solution, retain_graph=True)[0] + g
            return solution

        z.register_hook(solve)
        return self.head(z)


class Saliency(nn.Module):
    """A hook looks at the derivatives of a layer inside of the graph."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.first, self.second = nn.Linear(6 // tokens, 5), nn.Linear(5, 4)
        self.head = nn.Linear(4 * tokens, CLASSES)
        self.seen = []

    def forward(self, x):
        hidden = self.first(x.view(len(x), self.tokens, -1)).tanh()
        inner = self.second(hidden).tanh()
        outer = inner * 1

        def look(_):
            self.seen.append(grad(inner, hidden, torch.ones_like(inner), retain_graph=True)[0])

        outer.register_hook(look)
        return self.head(outer.flatten(1))


@pytest.mark.parametrize("kind", ["empirical", "exact"])
@pytest.mark.parametrize(
    "make", [Equilibrium, lambda: Saliency(1), lambda: Saliency(3)], ids=["fixed point", "1", "3"]
)
def test_passes_inside_of_the_backward_pass_do_not_count(make, kind, device):
    torch.manual_seed(0)
    model = make().to(device, torch.float64)
    params, batches = params_of(model), make_batches((5, 5, 2))
    got = fisher_information(model, params, batches, kind=kind)
    assert_close(got, fisher_oracle(model, params, batches, exact=kind == "exact"))
    assert_close(output_sensitivity(model, params, batches), mas_oracle(model, params, batches))


class Prompted(nn.Module):
    """What depends on no sample is calculated once, and kept with its graph."""

    def __init__(self):
        super().__init__()
        self.layer, self.text = nn.Linear(6, 5), nn.Linear(4, 5)
        self.prompts = nn.Parameter(torch.randn(CLASSES, 4))
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.text(self.prompts).tanh()
        return self.layer(x).tanh() @ self.kept.T


@pytest.mark.parametrize("sizes", [(1,), (1, 1, 2), (3, 2)])
def test_a_graph_that_the_model_keeps_is_there_for_the_next_pass(sizes, device):
    model = Prompted().to(device, torch.float64)
    params, batches = params_of(model), make_batches(sizes)
    expected = fisher_oracle(model, params, batches)
    model.kept = None
    assert_close(fisher_information(model, params, batches), expected)


@pytest.mark.parametrize("kind", ["empirical", "exact"])
def test_activations_are_given_back_as_the_last_backward_pass_goes(kind, device):
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv1d(1, 3, 2, padding=1), nn.Conv1d(3, 3, 2)
            self.third, self.head = nn.Conv1d(3, 3, 2), nn.Linear(15, CLASSES)
            self.gone = []

        def forward(self, x):
            early = self.first(x.unsqueeze(1))
            late = self.second(early.tanh()).tanh()
            kept = StorageWeakRef(late.untyped_storage())
            early.register_hook(lambda _: self.gone.append(kept.expired()))
            return self.head(self.third(late).tanh().flatten(1))

    model = Watched().to(device)
    x, y = make_batches((4,))[0]
    fisher_information(model, params_of(model), [(x.float(), y)], kind=kind)
    assert model.gone[-1]  # by when the gradient is at the first layer
    if kind == "exact":
        assert not any(model.gone[-CLASSES:-1])


class Node:
    """An autograd node, which counts how often somebody asks where the way back goes."""

    def __init__(self, *before):
        self.before, self.asked = before, 0

    @property
    def next_functions(self):
        self.asked += 1
        return tuple((node, 0) for node in (*self.before, None))


def call_at(node):
    return SimpleNamespace(edge=SimpleNamespace(node=node))


def test_ends_of_a_graph():
    root = Node()
    first = Node(root)
    second = Node(Node(root), Node(first))
    beside = Node(Node(root))
    last, *others, end, other_end = (
        call_at(n) for n in (Node(second, beside), second, first, beside)
    )
    assert ends_of([last, *others, end, other_end]) == [end, other_end]
    twice = [call_at(first), call_at(first)]
    assert ends_of(twice) == twice
    assert ends_of([]) == []


def test_long_graphs_are_walked_once():
    """A chain of states, from each of which a call without another one behind it leads off."""
    state, nodes, calls = Node(), [], []
    for _ in range(3000):
        state = Node(state, Node(state))
        nodes.append(state)
        calls.append(call_at(Node(state)))
    assert ends_of(calls) == calls
    assert sum(node.asked for node in nodes) <= 3 * len(nodes)
