"""What methods promise beyond one run: sums over all tasks, sample numbers, sampling errors."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from naive_methods import NaiveEWC
from toy_training import assert_same_state, make_model, make_task, train_tasks

from clext import EWC, MAS, SCP, RWalk
from clext.importance import fisher_information, sliced_cramer_importance

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
]

EXACT = {"rtol": 1e-10, "atol": 0.0}


def wander(model, seed):
    """To somewhere else, the same way for twins."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.3 * noise.to(parameter))


# ------------------------------------------------------------------ EWC


def kept(method):
    """Bytes of all that a method keeps, and how many tensors and numbers that are."""
    state = method.state_dict()
    tensors = [entry for entries in state["state"].values() for entry in entries.values()]
    return sum(entry.nbytes for entry in tensors), len(tensors), len(state["counters"])


@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
def test_all_anchors_are_the_sum_over_all_tasks(gamma, device):
    """Value and gradient, and nothing grows with the tasks."""
    model, other = make_model().to(device), make_model()
    method = EWC(model, strength=3.0, anchors="all", gamma=gamma)
    naive = NaiveEWC(other, 3.0)
    naive.gamma, naive.anchors = gamma, "all"
    size = kept(method)
    for number in range(5):
        wander(model, number)
        wander(other, number)
        batches = make_task(number)
        method.consolidate([(x.to(device), y.to(device)) for x, y in batches])
        naive.end_task(batches)
        assert kept(method) == size
    wander(model, 5)
    wander(other, 5)
    expected = naive.penalty()
    gradients = torch.autograd.grad(expected, naive.params)
    value = method.penalty()
    value.backward()
    torch.testing.assert_close(value.cpu(), expected, **EXACT)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-10, atol=1e-12)
        parameter.grad = None
    torch.testing.assert_close(method.add_penalty_grad_().cpu(), expected.detach(), **EXACT)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), gradient, rtol=1e-10, atol=1e-12)


def in_batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("fisher", ["empirical", "exact", "sample"])
@pytest.mark.parametrize("size", [1, 3, 100])
def test_sums_do_not_depend_on_batches_and_count_every_sample(fisher, size, device):
    """Twice the data are twice the precision; with the mean they would be the same."""
    x, y = (torch.cat(parts).to(device) for parts in zip(*make_task(0), strict=True))
    expected = EWC(make_model().to(device), fisher=fisher)
    method = EWC(make_model().to(device), fisher=fisher, weighting="sum")
    expected.consolidate(in_batches(x, y, 7))
    method.consolidate(in_batches(x, y, size))
    for name, entry in expected.importance.items():
        torch.testing.assert_close(method.importance[name], len(x) * entry, **EXACT)
    if fisher == "sample":
        return
    twice = EWC(make_model().to(device), fisher=fisher, weighting="sum")
    twice.consolidate(in_batches(torch.cat([x, x]), torch.cat([y, y]), size))
    for name, entry in method.importance.items():
        torch.testing.assert_close(twice.importance[name], 2 * entry, **EXACT)


def test_the_strength_of_bayes_rule():
    """The sum over old samples of -log p, to second order in a linear model, is the penalty."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    x = torch.ones(40, 1, dtype=torch.float64)
    y = torch.arange(40) % 2  # so that this is the minimum
    method = EWC(model, strength=1 / (2 * 10), fisher="exact", weighting="sum")
    method.consolidate([(x, y)])
    step = 1e-3
    with torch.no_grad():
        model.weight[0] += step
    old = F.cross_entropy(model(x), y, reduction="sum").item() - 40 * math.log(2)
    # The new task's mean loss over 10 samples stands for a tenth of its sum.
    assert method.penalty().item() == pytest.approx(old / 10, rel=1e-5)


class Indexed:
    """An iterable of the old kind."""

    def __getitem__(self, index):
        return make_task(0)[index]


@pytest.mark.parametrize(
    "data",
    [iter(make_task(0)), (batch for batch in make_task(0)), Indexed()],
    ids=["iterator", "generator", "indexed"],
)
def test_samples_of_any_iterable_are_counted(data):
    expected, method = EWC(make_model(), weighting="sum"), EWC(make_model(), weighting="sum")
    expected.consolidate(make_task(0))
    method.consolidate(data)
    assert_same_state(method.state_dict(), expected.state_dict())


# ------------------------------------------------------------------ MAS, SCP


def test_mas_without_memory_keeps_the_latest_task(device):
    model, other = make_model().to(device), make_model().to(device)
    method, expected = MAS(model, gamma=0.0), MAS(other)
    for number in range(2):
        method.consolidate(make_task(number, device=device))
    expected.consolidate(make_task(1, device=device))
    for name, entry in expected.importance.items():
        torch.testing.assert_close(method.importance[name], entry, **EXACT)


@pytest.mark.parametrize(
    ("kind", "options", "estimate"),
    [
        (EWC, {"fisher": "sample"}, partial(fisher_information, kind="sample")),
        (SCP, {"slices": 16}, partial(sliced_cramer_importance, slices=16)),
    ],
)
def test_each_task_draws_from_a_seed_of_its_own(kind, options, estimate, device):
    model, batches = make_model().to(device), make_task(0, device=device)
    method = kind(model, seed=5, **options)
    expected = [torch.zeros_like(entry) for entry in method.importance.values()]
    for k in range(2):
        new = estimate(model, list(model.parameters()), batches, seed=5 + k)
        expected = [old + entry for old, entry in zip(expected, new, strict=True)]
        method.consolidate(batches)
        for mine, theirs in zip(method.importance.values(), expected, strict=True):
            assert torch.equal(mine, theirs)


# ------------------------------------------------------------------ RWalk


def test_a_released_task_shorter_than_an_interval_has_no_score(device):
    model = make_model().to(device)
    method = RWalk(model, variant="released", interval=100)
    train_tasks(model, method, tasks=1)
    assert (method.interval_steps, method.task_steps) == (1, 0)
    for entry in method.importance.values():
        assert entry.eq(0).all()
    for key in ("path", "fisher", "running_fisher"):
        assert all(bool(entry.eq(0).all()) for entry in method._state.lists[key])


def test_variants_keep_their_state_to_themselves():
    released = RWalk(make_model(), variant="released")
    assert released.fused is None
    assert "running_fisher" in released.state_names
    paper = RWalk(make_model())
    assert paper.fused == RWalk.fused is not None
    assert "running_fisher" not in paper.state_names
