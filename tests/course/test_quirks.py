"""What the course's formulas do that the papers' do not, shown one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from course_training import ALL, train
from torch import nn
from toy_training import CLASSES, FEATURES, make_model, make_task

import clext
from clext.course import baseline, ewc, mas, rwalk, scp, si
from clext.importance import fisher_information

GUARDED = {kind: options for kind, options in ALL.items() if kind not in (baseline, si)}
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


def test_batch_mean(device):
    """Squares of single samples are far larger than those of the mean over a batch."""
    model = make_model().to(device)
    (x, y), *_ = make_task(0, device=device)
    single = [(x[n : n + 1], y[n : n + 1]) for n in range(4)]
    of_samples = ewc(model, single, device)._precision_matrices
    paper = fisher_information(model, list(model.parameters()), [(x, y)])
    torch.testing.assert_close(list(of_samples.values()), paper, **FINE)
    of_batch = ewc(model, [(x, y)], device)._precision_matrices
    torch.testing.assert_close(of_batch, squares(model, [(x, y)]), **FINE)
    assert all(of_batch[n].sum() < of_samples[n].sum() for n in of_batch)
    of_mas = mas(model, [(x, y)], device)._precision_matrices
    expected = gradients(model, model(x).square().sum(dim=1).mean())
    torch.testing.assert_close(of_mas, {n: g.abs() for n, g in expected.items()}, **FINE)


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


@pytest.mark.parametrize("kind", [ewc, mas, scp])
def test_guards_again(kind, device):
    """An entry of prev_guards holds its predecessors, and all entries are added."""
    model = make_model().to(device)
    batches = [make_task(k, device=device)[:2] for k in range(4)]

    def made(k, **guards):
        np.random.seed(k)  # noqa: NPY002
        return kind(model, dataloader=batches[k], device=device, **GUARDED[kind], **guards)

    alone = [made(k)._precision_matrices for k in range(4)]
    guards = [kind(model, dataloader=None, device=device, **GUARDED[kind])._precision_matrices]
    for k in range(4):
        guards.append(made(k, prev_guards=guards)._precision_matrices)
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


def test_rwalk_mixes_fisher_and_guards():
    """0.6 of the guards and 0.4 of the new Fisher information, whatever the number of batches."""
    model = make_model()
    first = rwalk(model, None, 0.1, "cpu")
    train(model, first, make_task(0))
    guards = [first._precision_matrices]
    batches = make_task(0)[:3]
    second = rwalk(model, batches, 0.1, "cpu", guards)
    fisher = underscored(squares(model, batches))
    expected = {n: 0.4 * entry for n, entry in fisher.items()}
    torch.testing.assert_close(second._precision_matrices, expected, **FINE)
    train(model, second, make_task(1))
    third = rwalk(model, batches, 0.1, "cpu", [*guards, second._precision_matrices])
    fisher = underscored(squares(model, batches))
    mixed = {n: 0.6 * expected[n] + 0.4 * fisher[n] for n in expected}
    torch.testing.assert_close(third._precision_matrices, mixed, **FINE)


def test_mean_slice():
    """The square of the mean slice: about L times smaller than the mean of the squares."""
    model = make_model()
    batch = make_task(0)[0]
    np.random.seed(3)  # noqa: NPY002
    found = scp(model, [batch, batch], 50, "cpu")._precision_matrices
    np.random.seed(3)  # noqa: NPY002
    expected = dict.fromkeys(found, 0.0)
    mean_of_squares = dict.fromkeys(found, 0.0)
    for _ in range(2):  # other directions for the same batch
        drawn = torch.from_numpy(np.random.randn(CLASSES, 50))  # noqa: NPY002
        for weights, sums in (
            ([(drawn / drawn.norm(dim=0)).mean(dim=1)], expected),
            ((drawn / drawn.norm(dim=0)).T, mean_of_squares),
        ):
            for direction in weights:
                slope = gradients(model, model(batch[0]).mean(dim=0) @ direction)
                for name, grad in slope.items():
                    sums[name] = sums[name] + grad**2 / 2 / len(weights)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)
    ratio = sum(e.sum() for e in mean_of_squares.values()) / sum(e.sum() for e in found.values())
    assert ratio > 10


# ---------------------------------------------------------------- the path


def test_penalty_in_the_path_and_the_last_step(device):
    """W holds the whole gradient times the step, for all steps of the task but the last."""
    model = make_model().to(device)
    first = si(model, None, 0.1, device)
    train(model, first, make_task(0, device=device))
    second = si(model, make_task(0, device=device), 0.1, device)
    steps, task_only = {}, {}
    strength, batches = 3.0, make_task(1, device=device)[:3]
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


def test_a_task_of_one_step_leaves_no_path():
    model = make_model()
    train(model, si(model, None, 0.1, "cpu"), make_task(0)[:1])
    with pytest.raises(ValueError, match="no buffer '0__weight_W'"):
        si(model, make_task(0), 0.1, "cpu")


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
    paper = clext.SI(make_model())
    for entry in paper._state.lists["path"]:
        entry.fill_(-1.0)
    paper.consolidate()
    assert all(not bool(entry.any()) for entry in paper.importance.values())


def test_half_a_score():
    """RWalk's first score is averaged with the zero that was before it."""
    model = make_model()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = rwalk(model, None, 0.1, "cpu")
    train(model, first, make_task(0))
    guard = rwalk(model, make_task(0), 0.1, "cpu", [first._precision_matrices])
    for name, p in model.named_parameters():
        key = name.replace(".", "__")
        distance = guard._precision_matrices[key] * (p.detach() - start[name]) ** 2 / 2
        score = first.W[key] / (distance + 0.1)
        torch.testing.assert_close(guard._n_omega[key], 0.5 * score, **FINE)


@pytest.mark.parametrize("kind", [si, rwalk])
def test_buffers_on_the_model(kind):
    model = make_model()
    own = set(model.state_dict())
    train(model, kind(model, None, 0.1, "cpu"), make_task(0))
    guard = kind(model, make_task(0), 0.1, "cpu")
    added = set(model.state_dict()) - own
    names = [name.replace(".", "__") for name, _ in model.named_parameters()]
    assert added == {n + s for n in names for s in ("_SI_prev_task", "_W", "_SI_omega")}
    assert model.get_buffer("0__weight_SI_omega").equal(guard._n_omega["0__weight"])

    again = kind(model, None, 0.1, "cpu")  # a second sequence on this model: zero at first, ...
    assert again.penalty(model) == 0
    train(model, again, make_task(1))
    fresh = make_model()
    fresh.load_state_dict({n: e for n, e in model.state_dict().items() if n in own})
    for n in names:  # ... then on top of the first one's
        for kept in ("_SI_prev_task", "_W"):
            fresh.register_buffer(n + kept, model.get_buffer(n + kept))
    found, alone = (kind(m, make_task(1), 0.1, "cpu")._n_omega for m in (model, fresh))
    assert all(not torch.allclose(found[n], alone[n]) for n in names)


def test_steps_without_gradients_are_passed_over():
    model = make_model()
    guard = si(model, None, 0.1, "cpu")
    with torch.no_grad():
        model[0].weight.add_(1.0)
    guard.update(model)
    assert guard.p_old["0__weight"].equal(model[0].weight)
    assert not any(bool(entry.any()) for entry in guard.W.values())
    assert not any(name.endswith("_W") for name, _ in model.named_buffers())


# ---------------------------------------------------------------- the model afterwards


@pytest.mark.parametrize("kind", ALL)
def test_left_behind(kind, device):
    """The mode and the gradients that the notebook's constructors leave."""
    model = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, CLASSES))
    model.to(device).double()
    statistics = model[1].running_mean.clone()
    guard = kind(model, dataloader=None, device=device, **ALL[kind])
    assert model.training == (kind in (baseline, si))
    model.train()
    train(model, guard, make_task(0, device=device))
    assert not torch.equal(statistics, model[1].running_mean)
    statistics = model[1].running_mean.clone()
    grads = [p.grad.clone() for p in model.parameters()]
    kind(model, dataloader=make_task(0, device=device), device=device, **ALL[kind])
    assert torch.equal(statistics, model[1].running_mean)
    untouched = kind in (baseline, si)
    assert model.training == model[1].training == untouched
    assert all(
        torch.equal(p.grad, g) == untouched for p, g in zip(model.parameters(), grads, strict=True)
    )
    if kind is ewc:
        expected = task_gradients(model, make_task(0, device=device)[-1])
        found = {name: p.grad for name, p in model.named_parameters()}
        torch.testing.assert_close(found, expected, **FINE)


@pytest.mark.parametrize("kind", ALL)
def test_frozen_parameters_are_left_alone(kind, device):
    model = make_model().to(device)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    guard = kind(model, dataloader=None, device=device, **ALL[kind])
    train(model, guard, make_task(0, device=device))
    guard = kind(model, dataloader=make_task(0, device=device), device=device, **ALL[kind])
    assert set(guard.params) == {"0.bias", "2.weight", "2.bias"}
    assert guard.penalty(model) == 0
    assert model[0].weight.equal(before)
    model[0].weight.requires_grad_(True)
    with pytest.raises(ValueError, match="parameter '0.weight' was frozen or absent when"):
        guard.penalty(model)


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
    forward = make_model()
    model.forward = lambda x: forward(x) + 0 * model[0].weight.sum()
    guard = ewc(model, make_task(0)[:2], "cpu")
    assert not bool(guard._precision_matrices["spare"].any())
