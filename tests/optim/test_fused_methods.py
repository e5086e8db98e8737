"""A method in the optimizer's pass is the method beside torch's optimizer."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from naive_methods import CASES as METHOD_CASES
from toy_training import make_model, make_task, train_steps, train_tasks

from clext import EWC, SI, Baseline, RWalk, optim

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.02}),
    "adamw": ("AdamW", {"lr": 0.02, "weight_decay": 0.1}),
}
EXACT = {"rtol": 1e-9, "atol": 1e-10}
SINGLE = {"rtol": 2e-3, "atol": 2e-4}

# What the pass does for them: nothing; the pull, with a constant; the path, and the average too.
# The last one is attached.
every_way = pytest.mark.parametrize(
    "case", ["baseline", "ewc all", "si", "rwalk", "rwalk released"], ids=str
)
every_pull = pytest.mark.parametrize("kind", [EWC, SI, RWalk], ids=lambda kind: kind.name)


def make(case, device="cpu", dtype=torch.float64):
    kind, _, strength, options = METHOD_CASES[case]
    model = make_model(dtype).to(device)
    return model, kind(model, strength=strength, **options)


def apart(model, optimizer="adam", params=None):
    name, options = OPTIMIZERS[optimizer]
    return getattr(torch.optim, name)(params or model.parameters(), **options)


def fused(model, method, optimizer="adam", params=None, **more):
    name, options = OPTIMIZERS[optimizer]
    return getattr(optim, name)(params or model.parameters(), **options, method=method, **more)


def fused_steps(model, optimizer, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(one, other, method, expected, tolerance=EXACT):
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    states = [each.state_dict().get("state", {}) for each in (method, expected)]
    torch.testing.assert_close(*states, **tolerance)
    for counter in method.counter_names:
        assert getattr(method, counter) == pytest.approx(getattr(expected, counter), rel=1e-6)


# ----------------------------------------------------------------------------- same numbers


@every_way
@pytest.mark.parametrize(
    ("optimizer", "dtype", "plan"),
    [
        *((name, torch.float64, "compiled") for name in OPTIMIZERS),
        ("adam", torch.float32, "compiled"),
        ("momentum", torch.float64, "plain torch"),
        ("adam", torch.float64, "plain torch"),
    ],
    indirect=["plan"],
    ids=str,
)
def test_three_tasks(case, optimizer, dtype, device, plan):
    """The way of tests/methods, which compares it with the slow, obvious form of each method."""
    (model, method), (other, expected) = make(case, device, dtype), make(case, device, dtype)
    for number in range(3):
        batches = make_task(number, dtype, device)
        fused_steps(model, fused(model, method, optimizer), batches)
        train_steps(other, expected, apart(other, optimizer), batches)
        assert method.steps == expected.steps or type(method) is Baseline
        method.consolidate(batches)
        expected.consolidate(batches)
    assert_same(model, other, method, expected, EXACT if dtype == torch.float64 else SINGLE)


@every_way
def test_one_optimizer_for_all_tasks_and_the_penalty_before_each_step(case, device, plan):
    (model, method), (other, expected) = make(case, device), make(case, device)
    mine, theirs = fused(model, method, clear_grad=True), apart(other)
    assert mine.penalty.item() == 0
    for number in range(3):
        batches = make_task(number, device=device)
        for batch in batches:
            before = method.penalty().item()
            method.steps = expected.steps
            fused_steps(model, mine, [batch])
            assert mine.penalty.item() == pytest.approx(before, rel=1e-9)
            train_steps(other, expected, theirs, [batch])
        method.consolidate(batches)
        expected.consolidate(batches)
    assert_same(model, other, method, expected)
    assert mine.penalty.shape == ()
    assert mine.penalty.device.type == device
    assert (mine.penalty.item() > 0) == (case != "baseline")


@every_way
def test_groups_and_parameters_that_the_method_does_not_know(case, device):
    results = []
    for way in ("fused", "apart"):
        model, method = make(case, device)
        extra = torch.nn.Parameter(torch.full((3,), 2.0, device=device).double())
        groups = [
            {"params": [*model[0].parameters(), extra], "lr": 0.003},
            {"params": model[2].parameters()},
        ]
        make_it = fused if way == "fused" else lambda model, _, params: apart(model, params=params)
        optimizer = make_it(model, method, params=groups)
        for number in range(2):
            batches = make_task(number, device=device)
            for x, y in batches:
                (F.cross_entropy(model(x), y) + extra.square().sum()).backward()
                if way == "apart":
                    method.add_penalty_grad_()
                optimizer.step()
                if way == "apart":
                    method.update()
                optimizer.zero_grad()
            method.consolidate(batches)
        results.append((model, method, extra))
    (model, method, extra), (other, expected, its_extra) = results
    method.steps = expected.steps
    assert_same(model, other, method, expected)
    torch.testing.assert_close(extra, its_extra, **EXACT)


@every_pull
@pytest.mark.parametrize("before", ["fused", "apart"])
def test_state_goes_from_one_way_to_the_other(kind, before, device):
    """In the middle of a task, and in the same one."""

    def train(model, method, optimizer, way, batches):
        run = fused_steps if way == "fused" else lambda m, o, b: train_steps(m, method, o, b)
        run(model, optimizer, batches)

    model, other = make_model().to(device), make_model().to(device)
    method, resumed, batches = kind(model), kind(other), make_task(1, device=device)
    train_tasks(model, method, tasks=1)
    optimizer = fused(model, method) if before == "fused" else apart(model)
    train(model, method, optimizer, before, batches[:6])
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, method)], buffer)
    buffer.seek(0)
    after = "apart" if before == "fused" else "fused"
    its_optimizer = fused(other, resumed) if after == "fused" else apart(other)
    states = torch.load(buffer, weights_only=True)
    for part, state in zip((other, its_optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    train(model, method, optimizer, before, batches[6:])
    train(other, resumed, its_optimizer, after, batches[6:])
    method.consolidate(batches)
    resumed.consolidate(batches)
    assert_same(other, model, resumed, method)


def test_importance_given_by_hand_holds_in_the_first_task_too(device):
    """Of a task learned elsewhere, say."""
    results = []
    for way in ("apart", "fused"):
        model = make_model().to(device)
        method = EWC(model, strength=3.0)
        method.importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        if way == "apart":
            train_steps(model, method, apart(model, "sgd"), make_task(0, device=device))
        else:
            fused_steps(model, fused(model, method, "sgd"), make_task(0, device=device))
        results.append((model, method))
    (model, method), (other, expected) = results
    assert_same(model, other, method, expected)
    free = make_model().to(device)
    train_steps(free, Baseline(free), apart(free, "sgd"), make_task(0, device=device))
    assert not torch.allclose(free[0].weight, model[0].weight, rtol=1e-3)


# ----------------------------------------------------------------------------- proximal


def very_strong(optimizer, proximal, device, steps=60):
    """The largest distance from the anchor after steps of another task at strength 1e10."""
    model = make_model(torch.float32).to(device)
    method = EWC(model, strength=1e10)
    batches = make_task(0, torch.float32, device)
    train_steps(model, EWC(model), torch.optim.Adam(model.parameters(), lr=0.02), batches)
    method.consolidate(batches)
    anchor = copy.deepcopy(model)
    for entry in method.importance.values():
        entry.clamp_(min=1e-4)
    stepper = fused(model, method, optimizer, proximal=proximal)
    other = make_task(1, torch.float32, device)
    for step in range(steps):
        fused_steps(model, stepper, [other[step % len(other)]])
    pairs = zip(model.parameters(), anchor.parameters(), strict=True)
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


def test_a_strength_of_1e10(device, plan):
    """Proximal steps stay at the anchor; Adam's would as well, by their size."""
    assert not very_strong("sgd", False, device) < 1e6  # huge, or NaN
    for optimizer in ("sgd", "momentum", "adam"):
        assert very_strong(optimizer, True, device) < 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_proximal_is_the_step_and_then_the_average_with_the_anchor(optimizer, device, plan):
    model = make_model().to(device)
    method = EWC(model, strength=3.0)
    method.consolidate(make_task(0, device=device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    other = copy.deepcopy(model)
    for each, stepper in (
        (model, fused(model, method, optimizer, proximal=True)),
        (other, apart(other, optimizer)),
    ):
        x, y = make_task(1, device=device)[0]
        F.cross_entropy(each(x), y).backward()
        stepper.step()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        weight = 2 * OPTIMIZERS[optimizer][1]["lr"] * 3.0 * method.importance[name]
        expected = (theirs + weight * method.anchor[name]) / (1 + weight)
        torch.testing.assert_close(mine, expected, **EXACT)
