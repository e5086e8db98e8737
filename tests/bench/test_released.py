"""Methods as released code has them (published/released.py), against plain loops in float64."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from naive_methods import Naive
from scipy.optimize import minimize
from torch import nn
from toy_training import make_model, make_task, train_tasks

BENCH = Path(__file__).resolve().parents[2] / "bench"
if not BENCH.is_dir():
    pytest.skip("bench/ is absent", allow_module_level=True)

STRENGTH = 2.0


@pytest.fixture
def released(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("published.released")


def assert_same(method, naive):
    entries = zip(
        method.model.parameters(),
        naive.params,
        method.importance.values(),
        naive.omega,
        strict=True,
    )
    for parameter, expected, importance, omega in entries:
        torch.testing.assert_close(importance, omega, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(parameter, expected, rtol=1e-9, atol=1e-12)
    assert any(bool(omega.any()) for omega in naive.omega)


class NaiveReleasedSI(Naive):
    def __init__(self, model, strength, xi):
        super().__init__(model, strength)
        self.xi, self.path = xi, self.zeros()
        self.anchor = self.zeros()

    def after_step(self):
        steps = zip(self.path, self.grads, self.params, self.old, strict=True)
        self.path = [path - g * (p.detach() - old) for path, g, p, old in steps]

    def end_task(self, batches):  # noqa: ARG002
        entries = zip(self.omega, self.path, self.params, self.anchor, strict=True)
        self.omega = [
            F.relu(omega + path / ((a - p.detach()) ** 2 + self.xi))
            for omega, path, p, a in entries
        ]
        self.anchor, self.path = self.now(), self.zeros()


def test_si_of_zenke2017(released):
    method = released.ReleasedSI(make_model(), strength=STRENGTH, xi=0.05)
    train_tasks(method.model, method)
    assert_same(method, NaiveReleasedSI(make_model(), STRENGTH, 0.05).train())


def test_the_loss_of_keras_has_no_gradient_where_a_probability_is_held(released):
    logits = torch.tensor([[20.0, 0.0], [-20.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    network = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad():
        network.weight.copy_(torch.eye(2))
    inputs, labels = logits.requires_grad_(), torch.zeros(3, dtype=torch.int64)
    loss = released.ReleasedSI(network).loss(inputs, labels)
    expected = -torch.tensor([1 - 1e-7, 1e-7, torch.tensor(1.0).sigmoid()]).double().log().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0.0)
    loss.backward()
    assert [bool(row.any()) for row in inputs.grad] == [False, False, True]


class NaiveRunningFisherEWC(Naive):
    def __init__(self, model, strength, interval):
        super().__init__(model, strength)
        self.interval, self.steps = interval, 0
        self.squares, self.running = self.zeros(), self.zeros()

    def after_step(self):
        self.squares = [s + g**2 for s, g in zip(self.squares, self.grads, strict=True)]
        self.steps += 1
        if self.steps % self.interval == 0:
            pairs = zip(self.running, self.squares, strict=True)
            self.running = [0.1 * r + 0.9 * s / self.interval for r, s in pairs]
            self.squares = self.zeros()

    def end_task(self, batches):  # noqa: ARG002
        flat = torch.cat([entry.flatten() for entry in self.running])
        self.omega = [(r - flat.min()) / (flat.max() - flat.min()) for r in self.running]
        self.anchor, self.squares = self.now(), self.zeros()


def test_ewc_of_agem2019(released):
    method = released.RunningFisherEWC(make_model(), strength=STRENGTH, interval=3)
    train_tasks(method.model, method)
    assert_same(method, NaiveRunningFisherEWC(make_model(), STRENGTH, 3).train())


def flat_gradient(model, inputs, labels, sign=1.0):
    model.zero_grad()
    (sign * F.cross_entropy(model(inputs), labels)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gem_of_agem2019_steps_along_the_past_alone_where_they_conflict(released):
    model = make_model()
    method = released.ReleasedGEM(model, per_task=7, margin=0.5)
    train_tasks(model, method)
    past = torch.stack([flat_gradient(model, *kept) for kept in method._kept_tasks()])
    x, y = make_task(1)[0]
    kept = flat_gradient(model, x, y)
    fits = bool((past @ kept >= 0).all())
    before = flat_gradient(model, x, y, sign=-1.0) if fits else kept
    assert bool((past @ before < 0).any())
    kernel = (past @ past.T).numpy()
    expected = minimize(
        lambda v: 0.5 * v @ kernel @ v,
        [1.0] * 3,
        jac=lambda v: kernel @ v,
        bounds=[(0.5, None)] * 3,
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    method.add_penalty_grad_()
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(after, torch.from_numpy(expected.x) @ past, rtol=1e-4, atol=1e-6)


def test_gem_of_agem2019_leaves_a_step_without_conflict_alone(released):
    model = make_model()
    method = released.ReleasedGEM(model, per_task=7)
    train_tasks(model, method, tasks=1)
    before = flat_gradient(model, *next(iter(method._kept_tasks())))
    method.add_penalty_grad_()
    assert torch.cat([p.grad.flatten() for p in model.parameters()]).equal(before)
