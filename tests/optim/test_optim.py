"""Optimizers without a method go the way of their namesakes in torch.optim."""

from __future__ import annotations

import pytest
import torch
from optim_cases import (
    CASES,
    PLAIN,
    assert_same_parameters,
    batch,
    loss_of,
    make_pair,
    train,
    twins,
)
from torch.nn import functional as F
from torch.optim import lr_scheduler

from clext import SI, optim

every_case = pytest.mark.parametrize("case", CASES)
every_kind = pytest.mark.parametrize("case", PLAIN)


# ----------------------------------------------------------------------------- trajectories


@every_case
@pytest.mark.parametrize(
    ("dtype", "plan"),
    [
        (torch.float64, "compiled"),
        (torch.float32, "compiled"),
        (torch.float64, "plain torch"),
    ],
    indirect=["plan"],
    ids=str,
)
def test_same_trajectory(case, dtype, plan, device):
    pairs = make_pair(case, device, dtype)
    for start in (0, 10, 20):
        for model, optimizer in pairs:
            train(model, optimizer, range(start, start + 10))
        assert_same_parameters(pairs[0][0], pairs[1][0], dtype)
    assert pairs[0][1].penalty.item() == 0


# Of the largest element of a tensor, after ten steps.
ROUNDING = {torch.float32: 2.5e-7, torch.float64: 4.3e-15}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_options_that_torch_tests_its_own_with(name, dtype, device, monkeypatch):
    pytest.importorskip("expecttest")  # which torch's list of them imports
    # It would freeze torch.backends.cudnn and others, which are ours to set.
    monkeypatch.setattr(torch.backends, "disable_global_flags", lambda: None)
    from torch.testing._internal.common_optimizers import optim_db

    (info,) = (entry for entry in optim_db if entry.optim_cls is getattr(torch.optim, name))
    inputs = info.optim_inputs_func(device=torch.device(device), dtype=dtype)
    taken = [entry for entry in inputs if not entry.kwargs.get("amsgrad")]
    assert len(taken) >= 4
    for entry in taken:
        pairs = []
        for library, model in zip((optim, torch.optim), twins(device, dtype), strict=True):
            pairs.append((model, getattr(library, name)(model.parameters(), **entry.kwargs)))
        for _ in range(10):
            for parameter in pairs[0][0].parameters():
                parameter.grad = torch.randn_like(parameter)
            for mine, theirs in zip(*(model.parameters() for model, _ in pairs), strict=True):
                theirs.grad = mine.grad.clone()
            for _, optimizer in pairs:
                optimizer.step()
        for mine, theirs in zip(*(model.parameters() for model, _ in pairs), strict=True):
            difference = (mine - theirs).abs().max() / theirs.abs().max()
            assert difference <= ROUNDING[dtype], entry.desc


@every_kind
def test_param_groups_and_one_that_is_added_later(case, device):
    pairs = make_pair(case, device, params=lambda model: [{"params": model.conv.parameters()}])
    for model, optimizer in pairs:
        train(model, optimizer, range(7))
        rest = [*model.body.parameters(), *model.heads.parameters()]
        optimizer.add_param_group({"params": rest, "lr": 0.003, "weight_decay": 0.2})
        model.zero_grad()
        train(model, optimizer, range(7, 25))
    assert_same_parameters(pairs[0][0], pairs[1][0])


SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=30),  # of momentum too
}


@every_kind
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_schedules(case, schedule, tensor, device, recwarn):
    models = twins(device)
    for kind, model in zip(CASES[case][:2], models, strict=True):
        lr = {"lr": torch.tensor(0.02, dtype=torch.float64)} if tensor else {}
        optimizer = kind(model.parameters(), **CASES[case][2] | lr)
        train(model, optimizer, range(22), after=SCHEDULES[schedule](optimizer).step)
    assert_same_parameters(*models)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


@every_kind
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("place", ["cpu", "device"])
def test_lr_is_read_from_its_tensor_at_each_step(case, shape, place, device):
    lr = torch.full(shape, 1.0, device="cpu" if place == "cpu" else device)
    mine, theirs, options = CASES[case]
    one, other = twins(device)
    tensor = mine(one.parameters(), **options | {"lr": lr})
    number = theirs(other.parameters(), **options)
    for step, rate in enumerate([0.1, 0.01, 0.2, 0.0]):
        lr.fill_(rate)
        number.param_groups[0]["lr"] = float(torch.tensor(rate))
        train(one, tensor, range(step, step + 1))
        train(other, number, range(step, step + 1))
    assert_same_parameters(one, other)


@every_kind
def test_closure(case, device):
    pairs = make_pair(case, device)
    for step in range(20):
        losses = []
        for model, optimizer in pairs:

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append(optimizer.step(closure).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert_same_parameters(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("case", ["sgd", "sgd dampening", "adam"])
def test_parameters_without_gradient_and_those_that_join_later(case, device):
    """The second head waits; then both take turns, and the convolution is frozen for a while."""
    pairs = make_pair(case, device)
    for model, optimizer in pairs:
        train(model, optimizer, range(5), head=0)
        waiting = [p for p in model.parameters() if p not in optimizer.state]
        assert len(waiting) == (6 if case == "sgd" else 0) + 2
        for step in range(5, 25):
            model.conv.requires_grad_(not 10 <= step < 15)
            train(model, optimizer, range(step, step + 1), head=step % 2)
    assert_same_parameters(pairs[0][0], pairs[1][0])


def test_momentum_that_is_switched_on_and_off(device):
    pairs = make_pair("sgd", device, dampening=0.5)
    for model, optimizer in pairs:
        for number, momentum in enumerate((0.0, 0.9, 0.0, 0.5)):
            optimizer.param_groups[0]["momentum"] = momentum
            train(model, optimizer, range(5 * number, 5 * number + 5))
    assert_same_parameters(pairs[0][0], pairs[1][0])


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@every_kind
def test_a_model_that_is_moved_takes_the_state_along(case, device):
    pairs = make_pair(case, "cpu")
    for model, optimizer in pairs:
        train(model, optimizer, range(5))
    model, optimizer = pairs[0]
    model.to(device)
    train(model, optimizer, range(5, 10))
    train(*pairs[1], range(5, 10))
    assert_same_parameters(model.cpu(), pairs[1][0])


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_steps_in_float32(case, dtype, device):
    """As torch does it with state and arithmetic in float32, the parameter rounded at each step."""
    mine, theirs, options = CASES[case]
    theta = torch.randn(300, device=device).to(dtype)
    parameter = torch.nn.Parameter(theta.clone())
    wide = torch.nn.Parameter(theta.float())
    optimizers = mine([parameter], **options), theirs([wide], **options)
    for _ in range(20):
        parameter.grad = torch.randn(300, device=device).to(dtype)
        wide.grad = parameter.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        # Ties may be rounded the other way, since the arithmetic is not the same to the last bit.
        torch.testing.assert_close(
            parameter.float(), wide.to(dtype).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5
        )
        with torch.no_grad():
            wide.copy_(parameter)
    for entry in optimizers[0].state[parameter].values():
        assert entry.dtype == torch.float32


def test_parameters_of_several_dtypes(device):
    models = twins(device, torch.float32)
    for kind, model in zip(CASES["adam"][:2], models, strict=True):
        model.heads.double()
        optimizer = kind(model.parameters(), lr=0.02)
        for step in range(5):
            hidden = model.body(torch.tanh(model.conv(batch(step, model)[0])).flatten(1))
            model.heads[0](hidden.double()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_parameters(*models, torch.float32)


def test_an_average_without_memory_is_the_gradient(device):
    """A small gradient after a large one: added to their difference, it would be lost."""
    for betas in ((0.0, 0.0), (0.0, 0.9), (0.4, 0.9)):
        ours, theirs = (torch.ones(5, device=device, requires_grad=True) for _ in range(2))
        pairs = [
            (ours, optim.Adam([ours], lr=1e-3, betas=betas)),
            (theirs, torch.optim.Adam([theirs], lr=1e-3, betas=betas)),
        ]
        for gradient in (1.1, 1e-8):
            for parameter, optimizer in pairs:
                parameter.grad = torch.full_like(parameter, gradient)
                optimizer.step()
        averages = [optimizer.state[entry]["exp_avg"] for entry, optimizer in pairs]
        torch.testing.assert_close(averages[0], averages[1], rtol=1e-5, atol=0.0)
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-7)


# ----------------------------------------------------------------------------- gradients


@every_kind
def test_clear_grad_replaces_zero_grad(case, device, plan):
    (model, optimizer), (other, reference) = make_pair(case, device)
    optimizer.clear_grad = True
    for step in range(20):
        loss_of(model, step).backward()
        pointers = [p.grad.data_ptr() for p in model.conv.parameters()]
        versions = [p.grad._version for p in model.conv.parameters()]
        optimizer.step()
        assert all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.grad is not None)
        assert pointers == [p.grad.data_ptr() for p in model.conv.parameters()]
        for version, parameter in zip(versions, model.conv.parameters(), strict=True):
            assert parameter.grad._version > version
    train(other, reference, range(20))
    assert_same_parameters(model, other)


@every_kind
def test_gradients_are_left_alone_otherwise(case, device, plan):
    ((model, optimizer), _) = make_pair(case, device)
    loss_of(model, 0).backward()
    before = [p.grad.clone() for p in model.conv.parameters()]
    versions = [p._version for p in model.conv.parameters()]
    optimizer.step()
    for grad, version, parameter in zip(before, versions, model.conv.parameters(), strict=True):
        assert torch.equal(parameter.grad, grad)
        assert parameter._version > version


@pytest.mark.parametrize("case", ["sgd", "sgd momentum", "sgd maximize"])
@pytest.mark.parametrize("clear", [True, False], ids=["to none", "to zero"])
def test_sgd_takes_sparse_gradients_as_torch_does(case, clear, device):
    kind, namesake, options = CASES[case]
    options = {**options, "weight_decay": 0.0}  # which torch refuses here
    models = []
    for each in (kind, namesake):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(9, 3, sparse=True), torch.nn.Linear(3, 2))
        optimizer = each(model.to(device, torch.float64).parameters(), **options)
        for rows in ([1, 1, 4], [0, 4], [8]):
            model(torch.tensor(rows, device=device)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=clear)
        models.append(model)
    assert_same_parameters(*models)


@pytest.mark.parametrize("case", ["adam", "adamw"])
def test_adam_refuses_sparse_gradients_as_torch_does(case, device):
    embedding = torch.nn.Embedding(4, 2, sparse=True, device=device)
    for kind in CASES[case][:2]:
        optimizer = kind(embedding.parameters(), **CASES[case][2])
        embedding.zero_grad()
        embedding(torch.tensor([1], device=device)).sum().backward()
        before = embedding.weight.clone()
        with pytest.raises(RuntimeError, match="^Adam.? does not support sparse gradients"):
            optimizer.step()
        assert torch.equal(embedding.weight, before)


@every_kind
@pytest.mark.parametrize("kind", [None, SI])
def test_a_model_that_is_converted_takes_the_state_along(case, kind, device):
    (model, optimizer), (twin, other) = make_pair(case, device)
    if kind is not None:  # without importance
        options = {**CASES[case][2], "method": kind(model)}
        optimizer = CASES[case][0](model.parameters(), **options)
    for number, form in enumerate((torch.contiguous_format, torch.channels_last, None)):
        steps = range(5 * number, 5 * number + 5)
        train(model, optimizer, steps)
        train(twin, other, steps)
        if form is not None:
            model.conv.to(memory_format=form)
            assert model.conv.weight.is_contiguous(memory_format=form)
    assert_same_parameters(model, twin)


def test_a_converted_model_goes_on_in_its_new_dtype(device):
    model, optimizer = make_pair("adam", device, torch.float32)[0]
    train(model, optimizer, range(3))
    kept = optimizer.state[model.conv.weight]["exp_avg"].clone()
    model.double()
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = optimizer.state[model.conv.weight]
    assert {entry.dtype for entry in state.values()} == {torch.float64}
    torch.testing.assert_close(state["exp_avg"], 0.9 * kept.double())
    assert state["step"].item() == 4


def test_a_bad_option_is_said_once(device):
    """Not taken for a conversion, after which the step is tried again."""
    model, optimizer = make_pair("adam", device)[0]
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["lr"] = -1.0
    loss_of(model, 1).backward()
    with pytest.raises(ValueError, match="lr is -1, expected") as caught:
        optimizer.step()
    assert caught.value.__context__ is None


# ----------------------------------------------------------------------------- mixed precision


def scaled_step(model, optimizer, scaler, step, poison=False, unscale=False):
    optimizer.zero_grad()
    scaler.scale(loss_of(model, step)).backward()
    if poison:
        model.conv.bias.grad[0] = torch.inf
    if unscale:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update()


@every_kind
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "clipped"])
def test_grad_scaler(case, unscale, device, plan):
    pairs = make_pair(case, device, torch.float32)
    for model, optimizer in pairs:
        scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=5)
        for step in range(20):
            before = [p.detach().clone() for p in model.parameters()]
            counts = [state["step"].item() for state in optimizer.state.values() if "step" in state]
            scaled_step(model, optimizer, scaler, step, poison=step in (0, 8), unscale=unscale)
            same = [torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
            if step in (0, 8):
                assert all(same)
                after = [s["step"].item() for s in optimizer.state.values() if "step" in s]
                assert counts == (after if step == 8 else [])
        assert scaler.get_scale() == 2.0 ** (10 - 2 + 3)
    assert_same_parameters(pairs[0][0], pairs[1][0], torch.float32)


def test_gradients_of_a_skipped_step_are_cleared_too(device):
    (model,) = twins(device, torch.float32, count=1)
    optimizer = optim.Adam(model.parameters(), clear_grad=True)
    scaler = torch.amp.GradScaler(device)
    scaler.scale(loss_of(model, 0)).backward()
    model.conv.bias.grad[0] = torch.nan
    scaler.step(optimizer)
    assert all(bool(p.grad.eq(0).all()) for p in model.parameters() if p.grad is not None)


# ----------------------------------------------------------------------------- torch.compile


@pytest.mark.slow
def test_compiled_models_and_loops(device):
    one, other = twins(device)
    compiled = torch.compile(one, backend="aot_eager")
    optimizer = optim.Adam(compiled.parameters(), lr=0.02)

    @torch.compile(backend="eager")
    def step(number):
        x, y = batch(number, one)
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    for number in range(5):
        step(number)
    train(other, torch.optim.Adam(other.parameters(), lr=0.02), range(5))
    assert_same_parameters(one, other)
