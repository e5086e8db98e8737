"""DGR against its formula, in all settings; its generator, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import (
    BATCH,
    FEATURES,
    TASKS,
    batches_for,
    begin,
    every_setting,
    make_examples,
    make_model,
    obvious_balance,
    obvious_distillation,
    old_heads,
    ranges,
    run_task,
    train,
)
from quick_runs import same, weights
from torch import nn
from toy_training import assert_same_state

from clext import DGR
from clext.methods.parts.vae import VAE

SMALL = {"hidden": (8, 6), "latent": 3}


class Blur(nn.Module):
    """A generator of a user's own, of which everything is known."""

    def __init__(self):
        super().__init__()
        self.middle = nn.Parameter(torch.full((FEATURES,), 0.1, dtype=torch.float64))

    def loss(self, inputs):
        return (inputs - self.middle).square().sum(1).mean()

    def sample(self, count, generator):
        noise = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64)
        return self.middle + noise.to(self.middle.device)


def train_by_the_formula(
    model, generator, setting, *, strength, balance, distill, temperature, scale
):
    """Returns the losses of the last task."""
    teacher = previous = None
    random = torch.Generator().manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    for number in range(TASKS):
        inputs, labels = make_examples(setting, number)
        active, losses = ranges(setting, number)[1] or range(2), []
        for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
            loss = F.cross_entropy(model(x)[:, active.start : active.stop], y)
            generator_loss = generator.loss(x)
            if teacher is not None:
                replayed = previous.sample(len(x), random).detach()
                logits, known = model(replayed), teacher(replayed).detach()
                heads = old_heads(setting, number)
                if distill:
                    old = obvious_distillation(logits, known, heads, temperature, scale)
                else:
                    old = []
                    for now, then in heads:
                        classes = [max(then, key=lambda c, row=row: row[c]) for row in known]
                        places = torch.tensor([now.index(c) for c in classes])
                        old.append(F.cross_entropy(logits[:, now.start : now.stop], places))
                loss = obvious_balance(loss, old, number, balance, strength)
                again = [generator.loss(replayed)]
                generator_loss = obvious_balance(generator_loss, again, number, balance, strength)
            for one, value in ((optimizer, loss), (generator_optimizer, generator_loss)):
                one.zero_grad()
                value.backward()
                one.step()
            losses.append(loss.detach())
        teacher, previous = copy.deepcopy(model), copy.deepcopy(generator)
    return torch.stack(losses)


@every_setting
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"balance": "sum", "strength": 0.7},
        {"distill": True, "strength": 1.5},
        {"distill": True, "temperature": 4.0, "scale": "none", "balance": "sum"},
        {"distill": True, "scale": "mean"},
    ],
    ids=str,
)
def test_trains_like_its_formula(setting, options, device):
    model, generator = make_model(setting, device=device), Blur()
    obvious, twin = make_model(setting), Blur()
    method = DGR(model, generator=generator, generator_lr=0.01, seed=5, **options)
    for number in range(TASKS):
        losses = run_task(method, setting, number)
    names = ("strength", "balance", "distill", "temperature", "scale")
    expected = train_by_the_formula(
        obvious, twin, setting, **{name: getattr(method, name) for name in names}
    )
    torch.testing.assert_close(losses.cpu(), expected, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(model.parameters(), obvious.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(generator.middle.cpu(), twin.middle, rtol=1e-9, atol=1e-10)
    assert method.generator is generator


def test_same_seed_same_bits(device):
    def run(seed):
        method = DGR(make_model(device=device), seed=seed, **SMALL)
        before = torch.get_rng_state()
        losses = [run_task(method, "class", number) for number in range(TASKS)]
        assert torch.equal(torch.get_rng_state(), before)
        return [torch.stack(losses), *weights(method.model), *weights(method.generator)]

    assert same(run(3), run(3))
    assert not same(run(3), run(4))


def test_a_look_at_the_loss_does_not_train_the_generator(device):
    method = DGR(make_model("domain", device=device), **SMALL)
    run_task(method, "domain", 0)
    inputs, labels = make_examples("domain", 1, device=device)
    before = weights(method.generator)
    with torch.no_grad():
        method.loss(inputs, labels)
    assert same(weights(method.generator), before)
    method.loss(inputs, labels)
    assert not same(weights(method.generator), before)


def test_the_generator_leaves_no_gradient_anywhere(device):
    method = DGR(make_model("domain", device=device), **SMALL)
    run_task(method, "domain", 0)
    inputs, labels = make_examples("domain", 1, device=device)
    method.loss(inputs.requires_grad_(), labels)
    assert inputs.grad is None
    for module in (method.model, method.generator, method._previous):
        assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("distill", [False, True])
def test_bf16(distill, device):
    method = DGR(make_model(dtype=torch.float32, device=device), distill=distill, **SMALL)
    seen = set()
    train(method, begin(method, "class", 0), autocast=True)
    method.generator.encoder.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    method.consolidate(batches_for(method, "class", 0))
    losses = run_task(method, "class", 1, autocast=True)
    assert seen == {torch.bfloat16}
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())
    assert {p.dtype for p in method.generator.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_generator_is_at_least_float32(dtype, device):
    method = DGR(make_model(dtype=dtype, device=device), **SMALL)
    for number in range(2):
        losses = run_task(method, "class", number)
    assert bool(losses.isfinite().all())
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in method.generator.parameters()} == {wide}


@pytest.mark.parametrize("began", [False, True])
def test_a_first_task_with_another_loss_is_not_replayed_and_that_is_said(began):
    method = DGR(make_model("domain"), **SMALL)
    inputs, labels = make_examples("domain", 0)
    if began:
        method.begin_task((inputs, labels))
    with pytest.warns(UserWarning, match=r"dgr saw no step of this task.*train on loss\(x, y\)"):
        method.consolidate([(inputs, labels)])
    expected = F.cross_entropy(method.model(inputs), labels)
    torch.testing.assert_close(method.loss(inputs, labels), expected)


def test_a_state_of_the_start_forgets_the_generator():
    method = DGR(make_model(), **SMALL)
    start, first = method.state_dict(), copy.deepcopy(method.model.state_dict())
    losses = run_task(method, "class", 0)
    method.load_state_dict(start)
    assert method.generator is None
    method.model.load_state_dict(first)
    assert torch.equal(run_task(method, "class", 0), losses)


def test_a_failed_load_leaves_an_own_generator_as_it_was():
    source, method = (DGR(make_model(), generator=Blur()) for _ in range(2))
    run_task(source, "class", 0)
    before, state = weights(method.generator), source.state_dict()
    for key in ("generator", "optimizer", "teacher", "previous"):
        with pytest.raises(ValueError, match="dgr: the state does not fit"):
            method.load_state_dict({**state, "extra": {**state["extra"], key: {"state": 3}}})
        assert same(weights(method.generator), before)
        assert method._previous is method._optimizer is None
    method.load_state_dict(state)
    assert same(weights(method.generator), weights(source.generator))


# ------------------------------------------------------------------ what it refuses


class Wrong(Blur):
    def __init__(self, samples=None, loss=None):
        super().__init__()
        self.samples, self.value = samples, loss

    def sample(self, count, generator):
        return super().sample(count, generator) if self.samples is None else self.samples(count)

    def loss(self, inputs):
        return super().loss(inputs) if self.value is None else self.value


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (
            Wrong(lambda n: torch.rand(n, 4)),
            r"sample\(2, ...\) .* \[2, 4\], expected \[2, 5\] like",
        ),
        (Wrong(lambda _: None), r"returned nothing, expected \[2, 5\]"),
        (Wrong(lambda n: torch.full((n, 5), torch.nan)), r"^dgr: sample\(...\) .* NaN or infinity"),
        (Wrong(loss=torch.zeros(2)), r"loss\(inputs\) .* returned .* \[2\], expected 0-dim"),
        (Wrong(loss=0.5), "returned float, expected 0-dim"),
        (VAE((4,), (3,), 2), r"\[2, 4\], expected \[2, 5\]"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused_when_first_used(generator, message):
    method = DGR(make_model(), generator=generator)
    before = weights(method.model), weights(generator)
    with pytest.raises(ValueError, match=message):
        run_task(method, "class", 0)
    assert same(weights(method.model), before[0])
    assert same(weights(generator), before[1])


def test_a_generator_that_has_broken_is_refused_when_a_task_ends():
    method = DGR(make_model(), generator=Blur())
    run_task(method, "class", 0)
    with torch.no_grad():
        method.generator.middle[0] = torch.nan
    with pytest.raises(ValueError, match="^dgr: 'middle' of the generator holds NaN"):
        method.consolidate()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            torch.rand(4, FEATURES) * 3 - 1,
            r"float32 between -.* expects numbers in \[0, 1\]; scale",
        ),
        (torch.full((4, FEATURES), torch.nan), "between nan and nan"),
        (torch.ones(4, FEATURES).long(), "inputs are torch.int64"),
    ],
)
def test_inputs_that_the_auto_encoder_cannot_learn_are_refused_once_in_a_task(inputs, message):
    method, labels = DGR(make_model("domain", torch.float32), **SMALL), torch.zeros(4).long()
    for number in range(2):
        before = method.state_dict()
        with pytest.raises(ValueError, match=message):
            method.begin_task((inputs, labels), block=range(2))
        assert_same_state(method.state_dict(), before)
        if inputs.is_floating_point():
            with pytest.raises(ValueError, match=message):
                method.loss(inputs, labels)
            assert_same_state(method.state_dict(), before)
        run_task(method, "domain", number)
    with pytest.raises(ValueError, match=r"^dgr: inputs are .* and the generator expects finite"):
        DGR(make_model("domain", torch.float32), generator=Blur()).begin_task((inputs / 0, labels))


def test_a_batch_that_the_model_does_not_take_makes_no_generator():
    method = DGR(make_model(), **SMALL)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        method.loss(torch.rand(6, FEATURES + 1, dtype=torch.float64), torch.zeros(6).long())
    assert method.generator is None
