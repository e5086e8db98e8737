"""GEM and A-GEM: the quadratic program, the projection, and the memory behind them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import nn
from torch.utils.checkpoint import checkpoint
from toy_training import CLASSES, FEATURES, make_model, make_task, train_tasks

from clext import AGEM, GEM, optim
from clext.methods.gem import projection_weights

BOTH = pytest.mark.parametrize("kind", [GEM, AGEM])


def gram_of(past: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    rows = np.vstack([past, gradient])
    return rows @ rows.T


def nearest(past: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient nearest to the given one without a negative product: every active set tried."""
    lengths = np.linalg.norm(past, axis=1, keepdims=True)
    past = past / np.where(lengths > 0, lengths, 1)  # the length of a constraint is of no account
    best = None
    count = len(past)
    for size in range(count + 1):
        for active in itertools.combinations(range(count), size):
            chosen = past[list(active)]
            candidate = gradient - chosen.T @ np.linalg.pinv(chosen @ chosen.T) @ (
                chosen @ gradient
            )
            fits = (past @ candidate >= -1e-9 * np.abs(gradient).max()).all()
            distance = np.linalg.norm(candidate - gradient)
            if fits and (best is None or distance < best[0] - 1e-12):
                best = (distance, candidate)
    assert best is not None
    return best[1]


def problems() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    past, gradient = random.normal(size=(4, 30)), random.normal(size=30)
    gradient -= 0.5 * past.sum(axis=0)
    twice = np.vstack([past, past[:2]])
    none = past.copy()
    none[1] = 0
    scales = past * np.array([[1e-6], [1.0], [1e3], [1e-2]])
    opposed = np.vstack([past[0], -past[0], past[1]])
    return {
        "one": (past[:1], gradient),
        "four": (past, gradient),
        "duplicates": (twice, gradient),
        "a zero gradient": (none, gradient),
        "zero gradients alone and one in conflict": (np.vstack([0 * past[:2], past[2]]), gradient),
        "other scales": (scales, gradient),
        "opposed": (opposed, gradient),
        "more than dimensions": (random.normal(size=(7, 3)), random.normal(size=3)),
        "tiny": (1e-12 * past, 1e-9 * gradient),
    }


PROBLEMS = problems()


@pytest.mark.parametrize("name", PROBLEMS)
def test_without_margin_it_is_the_nearest_gradient_without_conflict(name):
    past, gradient = PROBLEMS[name]
    assert (past @ gradient < 0).any()
    v = projection_weights(gram_of(past, gradient), margin=0.0)
    assert (v >= 0).all()
    projected = gradient + past.T @ v
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(projected, nearest(past, gradient), atol=1e-7 * scale)
    lengths = np.linalg.norm(past, axis=1) * np.linalg.norm(gradient)
    assert (past @ projected >= -1e-9 * lengths).all()


@pytest.mark.parametrize(("margin", "ridge"), [(0.0, 0.0), (0.5, 0.0), (0.5, 1e-3), (0.2, 3.0)])
@pytest.mark.parametrize("seed", range(5))
def test_equals_a_general_solver_with_margin_and_ridge(margin, ridge, seed):
    random = np.random.default_rng(seed)
    past, gradient = random.normal(size=(4, 20)), random.normal(size=20)
    gradient -= past[seed % 4]
    kernel, linear = past @ past.T + ridge * np.eye(4), past @ gradient
    expected = minimize(
        lambda v: 0.5 * v @ kernel @ v + linear @ v,
        np.full(4, margin + 1.0),
        jac=lambda v: kernel @ v + linear,
        bounds=[(margin, None)] * 4,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    assert expected.success
    v = projection_weights(gram_of(past, gradient), margin, ridge)
    np.testing.assert_allclose(v, expected.x, atol=1e-5)
    assert (v >= margin).all()


def test_a_gradient_without_conflict_stays_whatever_the_margin():
    past = np.eye(3)
    assert projection_weights(gram_of(past, np.array([1.0, 0.0, 2.0])), margin=0.5) is None
    broken = gram_of(past, np.array([-1.0, 0.0, 2.0]))
    broken[0, 1] = np.nan
    assert projection_weights(broken, margin=0.5) is None


def test_many_random_programs_are_solved():
    random = np.random.default_rng(1)
    for _ in range(300):
        count, size = random.integers(1, 25), random.integers(1, 40)
        past = random.normal(size=(count, size)) * 10.0 ** random.integers(-6, 6, size=(count, 1))
        past[random.integers(count)] = past[0] * (1 + 1e-9)
        gradient = random.normal(size=size) * 10.0 ** random.integers(-6, 6)
        v = projection_weights(gram_of(past, gradient), margin=0.0)
        if v is not None:
            lengths = np.linalg.norm(past, axis=1) * np.linalg.norm(gradient)
            assert (past @ (gradient + past.T @ v) >= -1e-6 * lengths).all()


# ----------------------------------------------------------------------------- in a model


def gradients_of_the_past(model, method):
    """One row for each task: of the mean loss on its memory, everything flat."""
    rows = []
    for inputs, labels in method._kept_tasks():
        model.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    return torch.stack(rows)


def conflicting_step(model, batches, inputs=4):
    """A gradient that undoes the past: its loss, with the sign turned; returned as one row."""
    model.zero_grad()
    for x, y in batches[:inputs]:
        (-F.cross_entropy(model(x), y)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def current(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gem_projects_the_accumulated_gradient_of_a_model(device):
    model = make_model().to(device)
    method = GEM(model, margin=0.0, per_task=7)
    train_tasks(model, method)
    past = gradients_of_the_past(model, method)
    before = conflicting_step(model, make_task(1, device=device))
    assert bool((past @ before < 0).any())
    assert method.add_penalty_grad_().item() == 0
    after = current(model)
    expected = nearest(past.cpu().numpy(), before.cpu().numpy())
    torch.testing.assert_close(after.cpu(), torch.from_numpy(expected), rtol=1e-8, atol=1e-10)
    assert bool((past @ after >= -1e-10).all())
    method.add_penalty_grad_()  # nothing is left to project
    torch.testing.assert_close(current(model), after)


def test_agem_follows_its_formula(device):
    model = make_model().to(device)
    method = AGEM(model, per_task=5, batch=1000)
    train_tasks(model, method)
    model.zero_grad()
    inputs, labels = method._examples
    F.cross_entropy(model(inputs), labels).backward()
    reference = current(model).clone()
    before = conflicting_step(model, make_task(1, device=device))
    product = before @ reference
    assert product < 0
    method.add_penalty_grad_()
    expected = before - product / (reference @ reference) * reference
    torch.testing.assert_close(current(model), expected, rtol=1e-9, atol=1e-12)
    assert abs(float(current(model) @ reference)) < 1e-10
    assert conflicting_step(model, make_task(1, device=device)).equal(before)
    for p in model.parameters():
        p.grad.neg_()
    kept = current(model).clone()
    assert kept @ reference > 0
    method.add_penalty_grad_()
    assert current(model).equal(kept)


def test_agem_draws_each_example_at_most_once_and_another_batch_at_each_step(monkeypatch):
    model = make_model()
    method = AGEM(model, per_task=10, batch=12)
    train_tasks(model, method)
    seen = []

    def look(inputs, labels):
        seen.append(inputs)
        return F.cross_entropy(model(inputs), labels)

    monkeypatch.setattr(method.heads, "loss_over_tasks", look)
    for _ in range(2):
        conflicting_step(model, make_task(0))
        method.add_penalty_grad_()
    for drawn in seen:
        assert drawn.shape == (12, FEATURES)
        assert len(drawn.unique(dim=0)) == 12
        assert all((method._examples[0] == row).all(dim=1).any() for row in drawn)
    assert not seen[0].equal(seen[1])


@BOTH
def test_the_first_task_costs_nothing(kind, monkeypatch):
    model = make_model()
    method = kind(model)
    monkeypatch.setattr(torch.autograd, "grad", lambda *_a, **_k: pytest.fail("a backward pass"))
    before = conflicting_step(model, make_task(0)).clone()
    assert method.add_penalty_grad_().item() == 0
    assert current(model).equal(before)


@BOTH
def test_frozen_and_unused_parameters_are_left_alone(kind):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.used, self.unused = (
                nn.Linear(FEATURES, 6),
                nn.Linear(6, CLASSES),
                nn.Linear(6, CLASSES),
            )
            self.frozen = nn.Linear(6, 6).requires_grad_(False)

        def forward(self, x):
            return self.used(self.frozen(torch.tanh(self.body(x))))

    model = TwoHeads().double()
    method = kind(model, **({"margin": 0.0} if kind is GEM else {"batch": 1000}))
    train_tasks(model, method, tasks=2)
    before = [p.grad for p in model.unused.parameters()]
    model.zero_grad()
    for x, y in make_task(0)[:4]:
        (-F.cross_entropy(model(x), y)).backward()
    model.body.bias.requires_grad_(False)  # frozen after its gradient was there
    kept, moved = model.body.bias.grad.clone(), model.body.weight.grad.clone()
    method.add_penalty_grad_()
    assert before == [None, None] == [p.grad for p in model.unused.parameters()]
    assert all(p.grad is None for p in model.frozen.parameters())
    assert model.body.bias.grad.equal(kept)
    assert not model.body.weight.grad.equal(moved)


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_batch_statistics_and_modes_stay(kind, training):
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Linear(6, CLASSES))
    model.double().train(training)
    method = kind(model)
    train_tasks(model, method, tasks=1)
    conflicting_step(model, make_task(0))
    buffers = dict(model.named_buffers())
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    gradient = current(model).clone()
    method.add_penalty_grad_()
    assert not current(model).equal(gradient)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert buffer.equal(before[name])
    assert all(module.training == training for module in model.modules())


@BOTH
def test_drawing_leaves_the_global_random_state(kind):
    model = make_model()
    method = kind(model, per_task=3)
    state = torch.get_rng_state()
    for number in range(2):
        method.consolidate(make_task(number))
        conflicting_step(model, make_task(0))
        method.add_penalty_grad_()
    assert torch.get_rng_state().equal(state)


@BOTH
def test_the_memory_holds_distinct_examples_of_each_task_with_their_labels(kind):
    tasks = [make_task(number) for number in range(3)]
    method = kind(make_model(), per_task=9)
    for batches in tasks:
        method.add_penalty_grad_()
        method.consolidate(iter(batches))
    for (inputs, labels), batches in zip(method._kept_tasks(), tasks, strict=True):
        x, y = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        places = [int((x == row).all(dim=1).nonzero()) for row in inputs]
        assert len(set(places)) == 9
        assert y[places].equal(labels)
    other = kind(make_model(), per_task=9, seed=1)
    other.consolidate(tasks[0])
    assert not other._examples[0].equal(method._examples[0][:9])
    whole = kind(make_model(), per_task=1000)
    whole.consolidate(tasks[0])
    assert len(whole._examples[1]) == sum(len(y) for _, y in tasks[0])


def test_every_example_is_kept_equally_often():
    batches = [(torch.arange(4.0)[:, None] + 4 * b, torch.zeros(4, dtype=int)) for b in range(5)]
    counts = torch.zeros(20)
    for seed in range(400):
        method = GEM(nn.Linear(1, 2), per_task=5, seed=seed)
        method.consolidate(batches)
        counts[method._examples[0].long().flatten()] += 1
    # Binomial: 400 draws of probability 1/4 each, deviation 8.7.
    assert float((counts - 100).abs().max()) < 5 * 8.7


@pytest.mark.parametrize(("kind", "options"), [(GEM, {"margin": 0.5}), (GEM, {}), (AGEM, {})])
def test_gradients_that_are_scaled_still_are_projected_alike(kind, options):
    results = []
    for scale in (None, 1.0, 1024.0, torch.tensor(0.5)):
        model = make_model()
        method = kind(model, per_task=6, **options)
        train_tasks(model, method, tasks=2)
        conflicting_step(model, make_task(0))
        if scale is not None:
            torch._foreach_mul_([p.grad for p in model.parameters()], float(scale))
        method.add_penalty_grad_(scale)
        results.append(current(model) / float(scale or 1))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-15)


@BOTH
def test_in_bf16_and_with_an_optimizer_of_clext(kind, device):
    model = make_model(torch.bfloat16).to(device)
    method = kind(model, per_task=6)
    optimizer = optim.SGD(model.parameters(), lr=0.05, method=method)
    for number in range(2):
        batches = make_task(number, torch.bfloat16, device)
        for x, y in batches:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate(batches)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert {rows.dtype for rows in method._rows} == {torch.float32}
    model.double()
    state = method.state_dict()
    state["extra"]["inputs"] = state["extra"]["inputs"].double()
    method.load_state_dict(state)
    conflicting_step(model, make_task(0, device=device))
    method.add_penalty_grad_()
    assert {rows.dtype for rows in method._rows} == {torch.float64}


@BOTH
def test_a_model_that_keeps_few_activations(kind):
    """Training goes through the checkpoint, the gradients of the past go without it."""
    plain, other = make_model(), make_model()
    other.forward = lambda x: other[2](
        checkpoint(lambda hidden: other[1](hidden), other[0](x), use_reentrant=True)
    )
    for model in (plain, other):
        train_tasks(model, kind(model, per_task=8), tasks=2)
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)
