"""A method in the optimizer's pass is the method beside torch's optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from naive_methods import CASES as METHOD_CASES
from toy_training import CLASSES, make_model, make_task, train_steps

from clext import EWC, METHODS, SCP, SI, Baseline, RWalk, optim

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*was not called in this task:UserWarning"),
]

OPTIMIZERS = {
    "sgd": ("SGD", {"lr": 0.05}),
    "momentum": ("SGD", {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {"lr": 0.02}),
    "adamw": ("AdamW", {"lr": 0.02, "weight_decay": 0.1}),
}
EXACT = {"rtol": 1e-9, "atol": 1e-10}
SINGLE = {"rtol": 2e-3, "atol": 2e-4}

every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.fixture(params=METHOD_CASES)
def case(request):
    return METHOD_CASES[request.param]


@pytest.fixture(params=METHODS)
def kind(request):
    return METHODS[request.param]


def make(case, device="cpu", dtype=torch.float64):
    kind, _, strength, options = case
    model = make_model(dtype).to(device)
    return model, kind(model, strength=strength, **options)


def apart(model, optimizer="adam", params=None):
    name, options = OPTIMIZERS[optimizer]
    return getattr(torch.optim, name)(params or model.parameters(), **options)


def fused(model, method, optimizer="adam", params=None, **more):
    name, options = OPTIMIZERS[optimizer]
    return getattr(optim, name)(params or model.parameters(), **options, method=method, **more)


def fused_steps(model, optimizer, batches):
    """Returns the penalties."""
    penalties = []
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        penalties.append(optimizer.penalty.item())
    return penalties


def assert_same(one, other, method, expected, tolerance=EXACT):
    for mine, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    for view in ("importance", "anchor"):
        for name, entry in getattr(method, view).items():
            torch.testing.assert_close(entry, getattr(expected, view)[name], **tolerance)
    for counter in method.counter_names:
        assert getattr(method, counter) == pytest.approx(getattr(expected, counter), rel=1e-6)


# ----------------------------------------------------------------------------- same numbers


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
    (model, method), (other, expected) = make(case, device, dtype), make(case, device, dtype)
    penalties = []
    for number in range(3):
        batches = make_task(number, dtype, device)
        penalties = fused_steps(model, fused(model, method, optimizer), batches)
        train_steps(other, expected, apart(other, optimizer), batches)
        method.consolidate(batches)
        expected.consolidate(batches)
    assert_same(model, other, method, expected, EXACT if dtype == torch.float64 else SINGLE)
    assert (max(penalties) > 0) == (type(method) is not Baseline)


def test_one_optimizer_for_all_tasks(case, device, plan):
    (model, method), (other, expected) = make(case, device), make(case, device)
    mine, theirs = fused(model, method, clear_grad=True), apart(other)
    for number in range(3):
        batches = make_task(number, device=device)
        fused_steps(model, mine, batches)
        train_steps(other, expected, theirs, batches)
        method.consolidate(batches)
        expected.consolidate(batches)
    assert_same(model, other, method, expected)


def test_the_penalty_is_that_before_the_step(case, device, plan):
    model, method = make(case, device)
    optimizer = fused(model, method)
    for number in range(2):
        batches = make_task(number, device=device)
        for batch in batches:
            before = method.penalty().item()
            (value,) = fused_steps(model, optimizer, [batch])
            assert value == pytest.approx(before, rel=1e-9)
        method.consolidate(batches)
    assert optimizer.penalty.shape == ()
    assert optimizer.penalty.device.type == device


def test_intervals_close_in_both_ways_alike(device):
    """Within the task, with what is left of an interval at its end."""
    case = (RWalk, None, 1.0, {"interval": 4})
    (model, method), (other, expected) = make(case, device), make(case, device)
    mine, theirs = fused(model, method), apart(other)
    for step, batch in enumerate(make_task(0, device=device)):
        fused_steps(model, mine, [batch])
        train_steps(other, expected, theirs, [batch])
        assert method.interval_steps == expected.interval_steps == (step + 1) % 4
        for key in ("path", "fisher", "task_score", "interval_start"):
            for name, entry in method._state.view(key).items():
                torch.testing.assert_close(entry, expected._state.view(key)[name], **EXACT)


def test_groups_and_parameters_that_the_method_does_not_know(case, device):
    def params(model):
        extra = torch.nn.Parameter(torch.full((3,), 2.0, device=device).double())
        first, last = model[0].parameters(), model[2].parameters()
        return [{"params": [*first, extra], "lr": 0.003}, {"params": last}], extra

    results = []
    for way in ("fused", "apart"):
        model, method = make(case, device)
        groups, extra = params(model)
        optimizer = (
            fused(model, method, params=groups) if way == "fused" else apart(model, params=groups)
        )
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
    assert_same(model, other, method, expected)
    torch.testing.assert_close(extra, its_extra, **EXACT)


def test_a_head_that_grows_between_tasks(kind, device):
    results = []
    for way in ("fused", "apart"):
        model = make_model().to(device)
        method = kind(model)
        for number in range(2):
            batches = [(x, y + 2 * number) for x, y in make_task(number, device=device)]
            if number == 1:
                grown = torch.nn.Linear(6, CLASSES + 2, device=device, dtype=torch.float64)
                with torch.no_grad():
                    grown.weight.fill_(0.5)[:CLASSES] = model[2].weight
                    grown.bias.zero_()[:CLASSES] = model[2].bias
                model[2] = grown
                method.refresh_parameters()
            if way == "fused":
                fused_steps(model, fused(model, method), batches)
            else:
                train_steps(model, method, apart(model), batches)
            method.consolidate(batches)
        results.append((model, method))
    (model, method), (other, expected) = results
    assert_same(model, other, method, expected)
    if kind.state_names:
        assert method.importance["2.weight"].shape[0] == CLASSES + 2


def test_half_precision(kind, device):
    """The path follows what is stored; everything stays finite, and something is important."""
    model = make_model(torch.bfloat16).to(device)
    method = kind(model)
    for number in range(2):
        batches = make_task(number, torch.bfloat16, device)
        fused_steps(model, fused(model, method), batches)
        method.consolidate(batches)
    for entry in method.importance.values():
        assert entry.dtype == torch.float32
        assert bool(entry.isfinite().all())
        assert bool(entry.any())


def test_scaled_gradients(kind, device):
    """The pull and the path are not scaled, and a skipped step leaves no trace."""
    results = []
    for scaled in (False, True):
        model = make_model(torch.float32).to(device)
        # Steps are counted on the host, those that are skipped too: one interval for the task.
        method = kind(model, **({"interval": 1000} if kind is RWalk else {}))
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12, enabled=scaled)
        for number in range(2):
            batches = make_task(number, torch.float32, device)
            optimizer = fused(model, method)
            for x, y in batches:
                if scaled:
                    scaler.scale(F.cross_entropy(model(x), y)).backward()
                    model[0].bias.grad.fill_(torch.inf)
                    scaler.step(optimizer)
                    scaler.update(2.0**12)
                    assert optimizer.penalty.item() == 0
                    optimizer.zero_grad()
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            method.consolidate(batches)
        results.append((model, method))
    (model, method), (other, expected) = results
    assert_same(model, other, method, expected, SINGLE)


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


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_strength_of_1e10(optimizer, device, plan):
    assert not very_strong(optimizer, False, device) < 1e6  # huge, or NaN
    assert very_strong(optimizer, True, device) < 1e-4


def test_proximal_adam_stays_at_the_anchor(device, plan):
    """The additive form ends here as well: it is the size of Adam's steps that saves it."""
    assert very_strong("adam", True, device) < 1e-4


@every_optimizer
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


def test_proximal_path_counts_the_whole_movement(device):
    model = make_model().to(device)
    method = SI(model, strength=2.0)
    optimizer = fused(model, method, "sgd", proximal=True)
    for number in range(2):
        fused_steps(model, optimizer, make_task(number, device=device))
        if number == 0:
            method.consolidate()
    before = [p.detach().clone() for p in model.parameters()]
    path = {name: entry.clone() for name, entry in method._state.view("path").items()}
    x, y = make_task(2, device=device)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        expected = path[name] - parameter.grad * (parameter - old)
        torch.testing.assert_close(method._state.view("path")[name], expected.detach(), **EXACT)


def test_proximal_needs_a_method_that_pulls():
    class Own(SCP):
        def update(self):
            pass

    model = make_model()
    for method in (None, Own(model)):
        with pytest.raises(ValueError, match="proximal=True needs a method that pulls, got"):
            optim.SGD(model.parameters(), method=method, proximal=True)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("given", [EWC, SCP], ids=lambda kind: kind.name)
def test_importance_given_by_hand_holds_in_the_first_task_too(given, loaded, device):
    """Of a task learned elsewhere, say."""
    ways = []
    for way in ("apart", "fused"):
        model = make_model().to(device)
        method = given(model, strength=3.0)
        for entry in method.importance.values():
            entry.fill_(1.0)
        if loaded:
            state, method = method.state_dict(), given(model, strength=3.0)
            method.load_state_dict(state)
        optimizer = apart(model, "sgd") if way == "apart" else fused(model, method, "sgd")
        for x, y in make_task(0, device=device):
            F.cross_entropy(model(x), y).backward()
            if way == "apart":
                method.add_penalty_grad_()
            optimizer.step()
            if way == "apart":
                method.update()
            optimizer.zero_grad()
        ways.append(model)
    for one, other in zip(*(model.parameters() for model in ways), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    free = make_model().to(device)
    train_steps(free, Baseline(free), apart(free, "sgd"), make_task(0, device=device))
    assert not torch.allclose(free[0].weight, ways[1][0].weight, rtol=1e-3)
