"""What the course's formulas do that the papers' do not, shown one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from course_training import ALL, train
from torch import nn
from toy_training import CLASSES, FEATURES, make_model, make_task

from clext.course import baseline, ewc, rwalk, scp, si
from clext.importance import fisher_information, sliced_cramer_importance

FINE = {"rtol": 1e-10, "atol": 1e-15}


def gradients(model, value):
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


def task_gradients(model, batch):
    x, y = batch
    return gradients(model, F.cross_entropy(model(x), y))


def squares(model, batches):
    found = [task_gradients(model, batch) for batch in batches]
    return {name: sum(g[name] ** 2 for g in found) / len(batches) for name in found[0]}


def underscored(entries):
    return {name.replace(".", "__"): entry for name, entry in entries.items()}


# ---------------------------------------------------------------- importance measured on data


def test_batch_mean():
    """Squares of single samples are far larger than those of the mean over a batch."""
    model = make_model()
    (x, y), *_ = make_task(0)
    single = [(x[n : n + 1], y[n : n + 1]) for n in range(4)]
    of_samples = ewc(model, single, "cpu")._precision_matrices
    paper = fisher_information(model, list(model.parameters()), [(x, y)])
    torch.testing.assert_close(list(of_samples.values()), paper, **FINE)
    of_batch = ewc(model, [(x, y)], "cpu")._precision_matrices
    torch.testing.assert_close(of_batch, squares(model, [(x, y)]), **FINE)
    assert all(of_batch[n].sum() < of_samples[n].sum() for n in of_batch)


def test_a_smaller_batch_counts_as_much():
    model = make_model()
    (x, y), *_ = make_task(0)
    uneven = [(x[:3], y[:3]), (x[3:], y[3:])]
    first, second = (squares(model, [batch]) for batch in uneven)
    found = ewc(model, uneven, "cpu")._precision_matrices
    torch.testing.assert_close(found, {n: (first[n] + second[n]) / 2 for n in found}, **FINE)
    paper = fisher_information(model, list(model.parameters()), uneven, kind="batch")
    weighted = [(3 * first[n] + second[n]) / 4 for n in found]
    torch.testing.assert_close(paper, weighted, **FINE)


def test_guards_again():
    """An entry of prev_guards holds its predecessors, and all entries are added."""
    model = make_model()
    batches = [make_task(k)[:2] for k in range(4)]
    alone = [ewc(model, batches[k], "cpu")._precision_matrices for k in range(4)]
    guards = [ewc(model, None, "cpu")._precision_matrices]
    for k in range(4):
        guards.append(ewc(model, batches[k], "cpu", guards)._precision_matrices)
    for row, factors in enumerate([[1], [1, 1], [2, 1, 1], [4, 2, 1, 1]], start=1):
        expected = {n: sum(f * alone[k][n] for k, f in enumerate(factors)) for n in guards[row]}
        torch.testing.assert_close(guards[row], expected, **FINE)


def test_guards_are_read_not_changed():
    model = make_model()
    guard = ewc(model, make_task(0)[:2], "cpu")._precision_matrices
    before = {name: entry.clone() for name, entry in guard.items()}
    later = ewc(model, make_task(1)[:2], "cpu", [None, guard, {}])
    torch.testing.assert_close(guard, before, rtol=0, atol=0)
    assert all(bool((later._precision_matrices[n] > before[n]).any()) for n in before)


def test_mean_slice():
    """The square of the mean slice: about L times smaller than the mean of the squares."""
    model = make_model()
    batch = make_task(0)[0]
    np.random.seed(3)  # noqa: NPY002
    found = scp(model, [batch] * 2, 50, "cpu")._precision_matrices
    paper = sliced_cramer_importance(model, list(model.parameters()), [batch])
    assert sum(e.sum() for e in paper) > 10 * sum(e.sum() for e in found.values())


# ---------------------------------------------------------------- the path


def test_penalty_in_the_path_and_the_last_step():
    """W holds the whole gradient times the step, for all steps of the task but the last."""
    model = make_model().to()
    first = si(model, None, 0.1, "cpu")
    train(model, first, make_task(0))
    second = si(model, make_task(0), 0.1, "cpu")
    steps, task_only = {}, {}
    strength, batches = 3.0, make_task(1)[:3]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.zero_grad()
    for index, (x, y) in enumerate(batches):
        value = F.cross_entropy(model(x), y)
        alone = gradients(model, value)
        loss = F.cross_entropy(model(x), y) + strength * second.penalty(model)
        second.update(model)
        optimizer.zero_grad()
        loss.backward()
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            if index < len(batches) - 1:
                moved = p.detach() - old[name]
                steps[name] = steps.get(name, 0) - p.grad * moved
                task_only[name] = task_only.get(name, 0) - alone[name] * moved
    torch.testing.assert_close(second.W, underscored(steps), **FINE)
    assert any(
        not torch.allclose(second.W[n], entry) for n, entry in underscored(task_only).items()
    )


@pytest.mark.parametrize("kind", [si, rwalk])
def test_negative_path(kind):
    """A parameter on whose way the loss rose is rewarded for moving on."""
    model = make_model()
    train(model, kind(model, None, 0.1, "cpu"), make_task(0))
    for name, buffer in model.named_buffers():
        if name.endswith("_W"):
            buffer.fill_(-1.0)
    guard = kind(model, make_task(0), 0.1, "cpu")
    assert all(bool((entry < 0).all()) for entry in guard._n_omega.values())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert guard.penalty(model) < 0


@pytest.mark.parametrize("kind", [si, rwalk])
def test_buffers_on_the_model(kind):
    model = make_model()
    own = set(model.state_dict())
    train(model, kind(model, None, 0.1, "cpu"), make_task(0))
    guard = kind(model, make_task(0), 0.1, "cpu")
    names = [name.replace(".", "__") for name, _ in model.named_parameters()]
    added = {n + s for n in names for s in ("_SI_prev_task", "_W", "_SI_omega")}
    assert set(model.state_dict()) - own == added
    assert model.get_buffer("0__weight_SI_omega").equal(guard._n_omega["0__weight"])


# ---------------------------------------------------------------- the model afterwards


@pytest.mark.parametrize("kind", ALL)
def test_left_behind(kind):
    """The mode that the notebook's constructors leave, and batch statistics as they were."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).double()
    guard = kind(model, dataloader=None, device="cpu", **ALL[kind])
    assert model.training == (kind in (baseline, si))
    model.train()
    train(model, guard, make_task(0))
    statistics = model[1].running_mean.clone()
    kind(model, dataloader=make_task(0), device="cpu", **ALL[kind])
    assert torch.equal(statistics, model[1].running_mean)
    assert model.training == model[1].training == (kind in (baseline, si))


# ---------------------------------------------------------------- unlike in the notebook


@pytest.mark.parametrize("kind", ALL)
def test_frozen_parameters_are_left_alone(kind):
    model = make_model()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    guard = kind(model, dataloader=None, device="cpu", **ALL[kind])
    train(model, guard, make_task(0))
    guard = kind(model, dataloader=make_task(0), device="cpu", **ALL[kind])
    assert set(guard.params) == {"0.bias", "2.weight", "2.bias"}
    assert guard.penalty(model) == 0
    assert model[0].weight.equal(before)


@pytest.mark.parametrize("kind", ALL)
def test_half_precision_models_keep_float32_state(kind, device):
    model = make_model(torch.bfloat16).to(device)
    batches = make_task(0, torch.bfloat16, device)
    guard = kind(model, dataloader=None, device=device, **ALL[kind])
    train(model, guard, batches)
    guard = kind(model, dataloader=batches, device=device, **ALL[kind])
    with torch.no_grad():
        model[0].weight.add_(1.0)
    penalty = guard.penalty(model)
    assert penalty.dtype == torch.float32
    assert bool(penalty.isfinite())
    assert kind is baseline or penalty != 0


def test_parameters_without_a_part_in_the_loss():
    model = make_model()
    model.register_parameter("spare", nn.Parameter(torch.ones(3, dtype=torch.float64)))
    guard = ewc(model, make_task(0)[:2], "cpu")
    assert not bool(guard._precision_matrices["spare"].any())


def test_empty_batches_do_not_count():
    model, batches = make_model(), make_task(0)
    x, y = batches[0]
    found, expected = (
        ewc(model, loader, "cpu")._precision_matrices
        for loader in ([batches[0], (x[:0], y[:0]), *batches[1:]], batches)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
