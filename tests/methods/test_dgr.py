"""DGR against its formula, in all settings; its generator, state, random numbers and refusals."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from incremental_tasks import (
    CLASSES,
    FEATURES,
    begin,
    every_incremental,
    make_model,
    make_task,
    naive_balance,
    naive_distillation,
    naive_heads,
    rows,
    take_steps,
    train_task,
)
from quick_runs import QUICK, same, small, weights
from torch import nn
from toy_training import assert_same_state

import clext
from clext import DGR, EWC, SI
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
        where = {"generator": generator, "device": self.middle.device, "dtype": torch.float64}
        return self.middle + torch.randn(count, FEATURES, **where)


def train_naively(model, generator, incremental, *, strength, balance, distill, temperature, scale):
    """Three tasks; returns the losses of the last."""
    teacher = previous = None
    random = torch.Generator().manual_seed(5)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    for number in range(3):
        (inputs, labels), _, active = make_task(number, incremental)
        active = active or range(6)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for batch in rows():
            x = inputs[batch]
            loss = F.cross_entropy(model(x)[:, active.start : active.stop], labels[batch])
            generator_loss = generator.loss(x)
            if teacher is not None:
                replayed = previous.sample(len(x), random).detach()
                logits, known = model(replayed), teacher(replayed).detach()
                heads = naive_heads(incremental, number)
                if distill:
                    old = naive_distillation(logits, known, heads, temperature, scale)
                else:
                    old = []
                    for now, then in heads:
                        classes = [max(then, key=lambda c, row=row: row[c]) for row in known]
                        places = torch.tensor([now.index(c) for c in classes])
                        old.append(F.cross_entropy(logits[:, now.start : now.stop], places))
                loss = naive_balance(loss, old, number, balance, strength)
                again = [generator.loss(replayed)]
                generator_loss = naive_balance(generator_loss, again, number, balance, strength)
            for one, value in ((optimizer, loss), (generator_optimizer, generator_loss)):
                one.zero_grad()
                value.backward()
                one.step()
            losses.append(loss.detach())
        teacher, previous = copy.deepcopy(model), copy.deepcopy(generator)
    return torch.stack(losses)


@every_incremental
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
def test_trains_like_its_formula(incremental, options):
    """Where the random numbers are known: on the CPU."""
    model, naive, generator, naive_generator = make_model(), make_model(), Blur(), Blur()
    method = DGR(model, generator=generator, generator_lr=0.01, seed=5, **options)
    for number in range(3):
        losses = train_task(method, number, incremental, own_loop=number == 1)
    named = ("strength", "balance", "distill", "temperature", "scale")
    expected = train_naively(
        naive, naive_generator, incremental, **{name: getattr(method, name) for name in named}
    )
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-10)
    for mine, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(generator.middle, naive_generator.middle, rtol=1e-9, atol=1e-10)
    assert method.generator is generator


@every_incremental
@pytest.mark.parametrize("distill", [False, True])
def test_same_seed_same_bits(incremental, distill, device):
    def run(seed):
        method = DGR(make_model().to(device), distill=distill, seed=seed, **SMALL)
        losses = [train_task(method, number, incremental) for number in range(3)]
        return [torch.stack(losses), *weights(method.model), *weights(method.generator)]

    assert same(run(3), run(3))
    assert not same(run(3), run(4))


def test_the_global_random_state_is_left_alone():
    method = DGR(make_model(), **SMALL)
    before = torch.get_rng_state()
    for number in range(2):
        train_task(method, number, "class")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_look_at_the_loss_does_not_train_the_generator(device):
    method = DGR(make_model().to(device), **SMALL)
    train_task(method, 0, "domain")
    (inputs, labels), _, _ = make_task(1, "domain", device)
    before = weights(method.generator)
    with torch.no_grad():
        method.loss(inputs, labels)
    assert same(weights(method.generator), before)
    method.loss(inputs, labels)
    assert not same(weights(method.generator), before)


def test_the_generator_leaves_no_gradient_anywhere(device):
    method = DGR(make_model().to(device), **SMALL)
    train_task(method, 0, "domain")
    (inputs, labels), _, _ = make_task(1, "domain", device)
    inputs.requires_grad_(True)
    method.loss(inputs, labels)
    assert inputs.grad is None
    for module in (method.model, method.generator, method._previous):
        assert all(parameter.grad is None for parameter in module.parameters())


@every_incremental
def test_a_regulariser_beside_it_knows_the_model_alone(incremental, device):
    model = make_model().to(device)
    method = SI(model).combine(DGR(model, **SMALL))
    for number in range(3):
        train_task(method, number, incremental)
    assert list(method.importance) == [name for name, _ in model.named_parameters()]
    assert any(bool(entry.any()) for entry in method.importance.values())
    assert method.label == "si+dgr"


@every_incremental
@pytest.mark.parametrize("distill", [False, True])
def test_bf16(incremental, distill, device):
    method = DGR(make_model(torch.float32).to(device), distill=distill, **SMALL)
    seen = set()
    begin(method, 0, incremental)
    method.outputs.blocks.clear()
    method.generator.encoder.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    for number in range(2):
        losses = train_task(method, number, incremental, autocast=True)
    assert seen == {torch.bfloat16}
    assert losses.dtype == torch.float32
    assert bool(losses.isfinite().all())
    assert {p.dtype for p in method.generator.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_models_of_other_types(dtype, device):
    method = DGR(make_model(dtype).to(device), **SMALL)
    for number in range(2):
        losses = train_task(method, number, "class")
    assert bool(losses.isfinite().all())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for p in method.generator.parameters()} == {wide}


def test_remembers_classes_that_are_gone():
    """Class-incremental, where plain training keeps nothing."""

    def remembered(method, **options):
        result = clext.train(
            method,
            model=small(),
            scenario="split",
            incremental="class",
            lr=1e-2,
            **{**QUICK, "epochs": 15},
            **options,
        )
        return result.accuracy[1, 0]

    assert remembered("baseline") < 0.1
    assert remembered("dgr", hidden=(128,), latent=16) > 0.6


# ------------------------------------------------------------------ state


def saved(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("own", [False, True], ids=["vae", "own generator"])
@pytest.mark.parametrize("combined", [False, True])
@every_incremental
def test_goes_on_after_a_resume_as_if_it_had_not_stopped(incremental, combined, own, device):
    def make():
        model = make_model().to(device)
        # It is for the method to move the generator, in the first run and in the resumed one.
        rehearsal = DGR(model, **({"generator": Blur()} if own else SMALL), seed=2)
        return EWC(model).combine(rehearsal) if combined else rehearsal

    method = make()
    for number in range(2):
        train_task(method, number, incremental)
    examples = begin(method, 2, incremental)
    optimizer = clext.optim.Adam(method.model.parameters(), lr=0.02, method=method)
    take_steps(method, examples, rows()[:2], optimizer)

    states = saved(method.model, method, optimizer)
    resumed = make()
    optimizers = [optimizer, clext.optim.Adam(resumed.model.parameters(), method=resumed)]
    resumed.model.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    optimizers[1].load_state_dict(states[2])
    for each, steps in zip((method, resumed), optimizers, strict=True):
        take_steps(each, examples, rows()[2:], steps)
        each.consolidate([tuple(examples)])
    assert same(weights(method.model), weights(resumed.model))
    assert_same_state(resumed.state_dict(), method.state_dict())


def test_a_state_is_a_copy(device):
    method = DGR(make_model().to(device), **SMALL)
    train_task(method, 0, "class")
    state = method.state_dict()
    kept = copy.deepcopy(state)
    train_task(method, 1, "class")
    assert_same_state(state, kept)


def test_a_copy_with_the_model_goes_on_alike():
    model = make_model()
    method = DGR(model, **SMALL)
    train_task(method, 0, "class")
    twin = copy.deepcopy((model, method))[1]
    losses = [train_task(each, 1, "class") for each in (method, twin)]
    assert torch.equal(*losses)
    assert_same_state(twin.state_dict(), method.state_dict())


def test_a_state_of_the_start_forgets_the_generator():
    method = DGR(make_model(), **SMALL)
    start, first = method.state_dict(), weights(method.model)
    losses = train_task(method, 0, "class")
    method.load_state_dict(start)
    assert method.generator is None
    for parameter, value in zip(method.model.parameters(), first, strict=True):
        parameter.data.copy_(value)
    assert torch.equal(train_task(method, 0, "class"), losses)


def test_everything_moves_with_the_method(device):
    method = DGR(make_model(), **SMALL)
    train_task(method, 0, "task")
    method.model.to(device)
    method.to(device)
    losses = train_task(method, 1, "task")
    assert losses.device.type == device
    assert {p.device.type for p in method.generator.parameters()} == {device}


def without(extra, name):
    return {key: value for key, value in extra.items() if key != name}


def with_nan(extra, name):
    changed = copy.deepcopy(extra)
    state = changed[name]["values"] if name == "teacher" else changed[name]
    next(value for value in state.values() if value.is_floating_point()).fill_(torch.nan)
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: without(e, "optimizer"), "'optimizer' is missing or unexpected"),
        (lambda e: {**e, "more": 1}, "'more' is missing or unexpected"),
        (lambda e: without(e, "previous"), "one of 'teacher' and 'previous', expected both"),
        (lambda e: without(e, "shape"), "is of another generator than the variational"),
        (lambda e: {**e, "shape": [0]}, "'shape' must be an integer >= 1, got 0"),
        (lambda e: {**e, "shape": [9]}, r"\['generator'\].* is \[8, 5\], expected \[8, 9\]"),
        (lambda e: {**e, "generator": {}}, r"\['generator'\] is not of this generator"),
        (lambda e: {**e, "optimizer": {}}, r"\['optimizer'\] does not fit"),
        (lambda e: {**e, "random": {"state": 3}}, r"\['random'\] is no state of a generator"),
        (lambda e: {**e, "random": {"device": "cpu", "state": torch.zeros(3).byte()}}, "on cpu"),
        (lambda e: with_nan(e, "generator"), r"\['generator'\].* holds NaN"),
        (lambda e: with_nan(e, "previous"), r"\['previous'\].* holds NaN"),
        (lambda e: with_nan(e, "teacher"), r"\['teacher'\].* holds NaN"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    source, method = DGR(make_model(), **SMALL), DGR(make_model(), **SMALL)
    train_task(source, 0, "class")
    state, before = source.state_dict(), method.state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        method.load_state_dict({**state, "extra": change(state["extra"])})
    assert "\n" not in str(caught.value)
    assert_same_state(method.state_dict(), before)
    assert method.generator is None
    method.load_state_dict(state)


def test_memory_does_not_grow_with_the_tasks():
    method = DGR(make_model(), **SMALL)
    sizes = []
    for number in range(3):
        train_task(method, number, "class")
        extra = method.state_dict()["extra"]
        modules = (extra["generator"], extra["previous"], extra["teacher"]["values"])
        moments = extra["optimizer"]["state"].values()
        sizes.append(
            [sum(value.numel() for value in module.values()) for module in modules]
            + [sum(state["exp_avg"].numel() for state in moments)]
        )
    generator = sum(p.numel() for p in method.generator.parameters())
    model = sum(p.numel() for p in method.model.parameters())
    assert sizes == [[generator, generator, model, generator]] * 3


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0},
            "dgr: temperature must be a finite number >= 0.0001 and <= 10000, got 0",
        ),
        ({"distill": 1}, "dgr: distill must be True or False, got 1"),
        ({"balance": "all"}, "unknown value of option 'balance' of dgr"),
        ({"hidden": ()}, r"dgr: hidden must be the widths of at least one layer, .* got \(\)"),
        ({"hidden": 400}, "hidden must be the widths .* got 400"),
        ({"hidden": (400, 0)}, "a width in hidden must be an integer >= 1, got 0"),
        ({"latent": 0}, "latent must be an integer >= 1, got 0"),
        ({"generator_lr": 0}, "generator_lr must be a finite number > 0, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        (
            {"generator": 3},
            "generator must be a torch.nn.Module .* got int without loss and sample",
        ),
        ({"generator": nn.Linear(2, 2)}, "got Linear without loss and sample; leave it out"),
        ({"generator": Blur().requires_grad_(False)}, "dgr: generator has no trainable parameter"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DGR(make_model(), **options)


class Wrong(Blur):
    def __init__(self, samples=None, loss=None):
        super().__init__()
        self.samples, self.value = samples, loss

    def sample(self, count, generator):
        return super().sample(count, generator) if self.samples is None else self.samples(count)

    def loss(self, inputs):
        return super().loss(inputs) if self.value is None else self.value


def test_a_generator_that_has_broken_is_refused_when_a_task_ends_or_begins():
    model = make_model()
    method = DGR(model, generator=Wrong())
    train_task(method, 0, "domain")
    with torch.no_grad():
        method.generator.middle[0] = torch.nan
    with pytest.raises(ValueError, match="^dgr: the generator's parameter 'middle' holds NaN"):
        method.consolidate()
    method._previous.samples = lambda n: torch.full((n, FEATURES), torch.inf)
    with pytest.raises(ValueError, match=r"sample\(...\) of the generator returned NaN or inf"):
        begin(method, 1, "domain")


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (Wrong(lambda n: torch.rand(n, 4)), r"sample\(2, ...\) .* returned \[2, 4\] on cpu"),
        (Wrong(lambda n: torch.rand(n + 1, FEATURES)), r"returned \[3, 5\].*expected \[2, 5\]"),
        (Wrong(lambda _: None), r"returned NoneType, expected \[2, 5\] on cpu, like the inputs"),
        (
            Wrong(lambda n: torch.full((n, FEATURES), torch.nan)),
            r"^dgr: sample\(...\) of the generator returned NaN or infinity, expected",
        ),
        (Wrong(loss=torch.zeros(2)), r"loss\(inputs\) .* returned \[2\], expected 0-dim"),
        (Wrong(loss=0.5), "returned float, expected 0-dim"),
        (VAE((4,), (3,), 2), r"shape \[24, 5\], expected \['N', 4\], which the generator makes"),
    ],
)
def test_a_generator_that_does_not_fit_is_refused_when_first_used(generator, message):
    model = make_model()
    method = DGR(model, generator=generator)
    before = weights(model), weights(generator)
    with pytest.raises(ValueError, match=message) as caught:
        train_task(method, 0, "domain")
    assert "\n" not in str(caught.value)
    assert same(weights(model), before[0])
    assert same(weights(generator), before[1])
    assert method._previous is None


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.rand(4, FEATURES) * 3 - 1, r"inputs lie between -.* and .*numbers in \[0, 1\]"),
        (torch.full((4, FEATURES), torch.nan), "inputs lie between nan and nan"),
        (torch.ones(4, FEATURES).long(), "inputs are torch.int64, and the variational"),
    ],
)
def test_inputs_that_the_auto_encoder_cannot_learn_are_refused(inputs, message):
    method = DGR(make_model(torch.float32), **SMALL)
    before = method.state_dict()
    labels = torch.zeros(4).long()
    with pytest.raises(ValueError, match=message):
        method.begin_task((inputs, labels), block=range(CLASSES), active=range(CLASSES))
    with pytest.raises(ValueError, match=message):
        method.loss(inputs, labels)
    assert_same_state(method.state_dict(), before)
    assert method.outputs.active is None


def test_a_later_task_of_another_shape_is_refused():
    method = DGR(make_model(), **SMALL)
    train_task(method, 0, "domain")
    inputs = torch.rand(4, FEATURES + 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"shape \[4, 6\], expected \['N', 5\]"):
        method.begin_task((inputs, torch.zeros(4).long()))


@pytest.mark.parametrize("ended", [0, 1])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: (x / 0, y), "inputs (lie between .*inf|hold NaN)"),
        (
            lambda x, y: (x.index_fill(0, torch.tensor([2]), torch.nan), y),
            "inputs (lie between nan|hold NaN)",
        ),
        (lambda x, y: (x[:, :4], y), r"inputs have shape \[6, 4\], expected \['N', 5\], which"),
        (lambda x, y: (x, y + 7), "labels reach from 7 to 8, expected 0 to 5"),
    ],
)
def test_a_batch_in_the_middle_of_a_task_is_refused_before_anything_moves(
    spoil, message, own, ended
):
    method = DGR(make_model(), generator=Blur() if own else None, **SMALL)
    if ended:
        train_task(method, 0, "domain")
    (inputs, labels), _, _ = make_task(ended, "domain")
    method.loss(inputs[:6], labels[:6])
    before, random = method.state_dict(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        method.loss(*spoil(inputs[:6], labels[:6]))
    assert_same_state(method.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_a_loss_that_fails_in_a_later_task_has_taught_the_generator_nothing():
    """As where memory runs out once the generated inputs are in the model too."""
    method = DGR(make_model(), **SMALL)
    train_task(method, 0, "domain")
    (inputs, labels), _, _ = make_task(1, "domain")
    method.loss(inputs[:6], labels[:6])
    before, calls = method.state_dict(), []

    def fail_on_the_second(*_):
        calls.append(None)
        if len(calls) == 2:
            raise MemoryError("no more")

    hook = method.model.register_forward_pre_hook(fail_on_the_second)
    with pytest.raises(MemoryError):
        method.loss(inputs[:6], labels[:6])
    hook.remove()
    assert_same_state(method.state_dict(), before)
    method.loss(inputs[:6], labels[:6])


@pytest.mark.parametrize("began", [False, True])
def test_a_first_task_with_another_loss_is_not_replayed_and_that_is_said(began):
    method = DGR(make_model(), **SMALL)
    (inputs, labels), _, _ = make_task(0, "domain")
    if began:
        method.begin_task((inputs, labels))
    F.cross_entropy(method.model(inputs), labels).backward()
    with pytest.warns(UserWarning, match="loss.. of this dgr was not called .* learned nothing"):
        method.consolidate([(inputs, labels)])
    expected = F.cross_entropy(method.model(inputs), labels)
    torch.testing.assert_close(method.loss(inputs, labels), expected)


@pytest.mark.parametrize("began", [False, True])
def test_inputs_that_are_not_scaled_any_more_are_refused_in_a_later_task(began):
    method = DGR(make_model(), **SMALL)
    train_task(method, 0, "domain")
    (inputs, labels), _, _ = make_task(1, "domain")
    if began:
        method.begin_task((inputs, labels))
    before = method.state_dict()
    with pytest.raises(ValueError, match=r"^dgr: inputs lie between .* numbers in \[0, 1\]; scale"):
        method.loss(inputs * 255, labels)
    assert_same_state(method.state_dict(), before)


def test_a_batch_that_the_model_does_not_take_makes_no_generator():
    method = DGR(make_model(), **SMALL)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        method.loss(torch.rand(6, FEATURES + 1, dtype=torch.float64), torch.zeros(6).long())
    assert method.generator is None
    (inputs, labels), _, _ = make_task(0, "domain")
    method.loss(inputs, labels)
    assert method.generator.shape == (FEATURES,)


@pytest.mark.parametrize("own_loop", [False, True])
def test_values_are_looked_at_in_each_step_where_that_is_free_and_else_once_a_task(
    own_loop, device, monkeypatch
):
    looked = []

    def check(*_, values, **__):
        looked.append(values)

    monkeypatch.setattr("clext.methods.dgr.check_inputs", check)
    method = DGR(make_model().to(device), **SMALL)
    for number in range(2):
        looked.clear()
        train_task(method, number, "domain", own_loop=own_loop)
        steps = len(rows()) + (not own_loop)
        assert looked == ([True] * steps if device == "cpu" else [True] + [False] * (steps - 1))
