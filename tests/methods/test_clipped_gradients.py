"""What `clip_grad_norm_` multiplied with goes with the gradients that it clipped, and no others."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from condition_loops import WAYS, Trained
from toy_training import make_task

from clext import optim

PATHS = ("si", "rwalk", "rwalk released")

every_path = pytest.mark.parametrize("case", PATHS)
every_way = pytest.mark.parametrize("way", WAYS)

REFUSED = r"the gradients were changed after clip_grad_norm_\(\).* call clip_grad_norm_ last"


def loss_of(trained, batch):
    x, y = batch
    return F.cross_entropy(trained.model(x), y)


def train(case, way, device, *, spoil=None, clip=None):
    trained = Trained(case, way, device)
    for batch in make_task(0, device=device):
        if spoil is not None:
            spoil(trained, batch)
        trained.step(batch, clip=clip)
    return trained


def assert_same_training(one, other):
    for mine, theirs in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for key, entries in one.method._state.lists.items():
        for mine, theirs in zip(entries, other.method._state.lists[key], strict=True):
            assert torch.equal(mine, theirs), key


def drop(trained, batch):
    trained.backward(batch)
    trained.method.clip_grad_norm_(1e-3)
    trained.optimizer.zero_grad()


@every_path
@every_way
@pytest.mark.parametrize("clip", [None, [0.05]], ids=["whole", "clipped"])
def test_the_factor_of_a_dropped_step_is_forgotten(case, way, clip, device, plan):
    assert_same_training(
        train(case, way, device, spoil=drop, clip=clip), train(case, way, device, clip=clip)
    )


@every_path
def test_the_factor_is_forgotten_without_a_pull_too(case, device, plan):
    """In the first task, or with penalty() in the loss, nothing comes between backward and step."""
    results = []
    for dropped in (False, True):
        trained = Trained(case, "apart", device)
        for batch in make_task(0, device=device):
            if dropped:
                drop(trained, batch)
            trained.backward(batch)
            trained.optimizer.step()
            trained.method.update()
        results.append(trained)
    assert_same_training(*results)


@every_path
@every_way
def test_a_new_gradient_at_the_address_of_a_dropped_one_is_not_taken_for_it(case, way, device):
    """Accumulated twice, it has the version that the clipped one had."""
    results = []
    for dropped in (False, True):
        trained = Trained(case, way, device)
        for batch in make_task(0, device=device):
            if dropped:
                drop(trained, batch)
                gc.collect()
            trained.step(batch, batch)
        results.append(trained)
    assert_same_training(*results)


@every_path
def test_a_dropped_step_of_this_optimizer_may_zero_in_place(case, device):
    def drop_in_place(trained, batch):
        trained.backward(batch)
        trained.method.clip_grad_norm_(1e-3)
        trained.optimizer.zero_grad(set_to_none=False)

    assert_same_training(
        train(case, "fused", device, spoil=drop_in_place), train(case, "fused", device)
    )


@every_path
@every_way
@pytest.mark.parametrize("then", ["step", "clip", "pull"])
def test_an_accumulation_onto_clipped_gradients_is_refused(case, way, then, device, plan):
    first, second = make_task(0, device=device)[:2]
    trained = Trained(case, way, device)
    trained.backward(first)
    trained.method.clip_grad_norm_(1e-3)
    loss_of(trained, second).backward()
    before = copy.deepcopy(trained.model.state_dict())
    state = trained.method.state_dict()["state"]
    act = {
        "step": trained.optimizer.step,
        "clip": lambda: trained.method.clip_grad_norm_(1e-3),
        "pull": trained.method.add_penalty_grad_,
    }[then]
    if then == "pull" and (way == "fused" and case != "rwalk released"):
        pytest.skip("the optimizer's step does it")
    grads = [p.grad.clone() for p in trained.model.parameters()]
    for _ in range(2):  # and it is not let through at the second try
        with pytest.raises(RuntimeError, match=REFUSED):
            act()
    for name, entry in trained.model.state_dict().items():
        assert torch.equal(entry, before[name])
    for parameter, grad in zip(trained.model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    for key, entries in trained.method.state_dict()["state"].items():
        assert all(torch.equal(entry, state[key][name]) for name, entry in entries.items())
    trained.step(first)  # whose zero_grad() has made all well


@every_way
def test_a_gradient_that_joins_the_clipped_ones_is_refused(way, device):
    trained = Trained("si", way, device)
    trained.backward(make_task(0, device=device)[0])
    trained.model[2].bias.grad = None
    trained.method.clip_grad_norm_(1e-3)
    trained.model[2].bias.grad = torch.ones_like(trained.model[2].bias)
    with pytest.raises(RuntimeError, match=REFUSED):
        trained.optimizer.step()


@every_path
def test_launch_refuses_too(case, device):
    if case == "rwalk released":
        pytest.skip("launch refuses it altogether")
    first, second = make_task(0, device=device)[:2]
    trained = Trained(case, "fused", device)
    trained.backward(first)
    trained.method.clip_grad_norm_(1e-3)
    loss_of(trained, second).backward()
    with pytest.raises(RuntimeError, match=REFUSED):
        trained.optimizer.launch()


@every_path
def test_clipping_does_not_hide_an_edit_after_the_pull(case, device, plan):
    """The penalty's share is no longer what the method's own clipping alone has made of it."""
    trained = Trained(case, "apart", device)
    batch = make_task(0, device=device)[0]
    trained.backward(batch)
    trained.method.add_penalty_grad_()
    torch.nn.utils.clip_grad_norm_(trained.model.parameters(), 1e-3)
    trained.method.clip_grad_norm_(0.05)
    before = copy.deepcopy(trained.model.state_dict())
    with pytest.raises(RuntimeError, match="changed between add_penalty_grad_"):
        trained.optimizer.step()
    assert all(value.equal(before[name]) for name, value in trained.model.state_dict().items())
    trained.step(batch, clip=[0.05])  # and the next one is as ever


@every_path
def test_a_dropped_pull_does_not_stop_the_next_step(case, device):
    trained = Trained(case, "apart", device)
    batch = make_task(0, device=device)[0]
    trained.backward(batch)
    trained.method.add_penalty_grad_()
    trained.backward(batch)
    trained.method.clip_grad_norm_(0.1)
    trained.finish(clip=[0.05])


# ------------------------------------------------------------------ no false alarms


@every_path
@every_way
@pytest.mark.parametrize("set_to_none", [True, False])
def test_documented_loops_raise_no_alarm(case, way, set_to_none, device):
    """Clipped before the pull and after it, with either way to clear gradients."""
    trained = Trained(case, way, device)
    for number, batch in enumerate(make_task(0, device=device)):
        loss_of(trained, batch).backward()
        if number % 2:
            trained.method.clip_grad_norm_(0.1)
        trained.finish(clip=[0.05])
        assert trained.method._task_scale is None
        trained.optimizer.zero_grad(set_to_none)


@every_path
@every_way
@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_that_a_scaler_skips_raise_no_alarm(case, way, set_to_none, device):
    results = []
    for poisoned in (False, True):
        trained = Trained(case, way, device, dtype=torch.float32)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**8, growth_interval=10_000)
        for batch in make_task(0, torch.float32, device):
            for poison in [True, False] if poisoned else [False]:
                scaler.scale(loss_of(trained, batch)).backward()
                if poison:
                    trained.model[0].bias.grad.fill_(torch.inf)
                trained.finish(clip=[0.05], scaler=scaler)
                trained.optimizer.zero_grad(set_to_none)
                scaler.update(2.0**8)
        results.append(trained)
    for mine, theirs in zip(*(each.model.parameters() for each in results), strict=True):
        assert torch.equal(mine, theirs)
    if case == "si":  # RWalk counts skipped steps
        assert_same_training(*results)


@every_path
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}], ids=str)
def test_penalty_in_the_loss_and_fused_steps_of_torch(case, options, device):
    """They write to the gradients; of two optimizers the second sees what the first has done."""
    trained = Trained(case, "apart", device)
    halves = [trained.model[0].parameters(), trained.model[2].parameters()]
    optimizers = [torch.optim.Adam(half, **options) for half in halves]
    for batch in make_task(0, device=device):
        (loss_of(trained, batch) + trained.method.penalty()).backward()
        trained.method.clip_grad_norm_(0.1)
        for optimizer in optimizers:
            optimizer.step()
        trained.method.update()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=False)


@every_path
@every_way
def test_clipped_in_a_closure(case, way, device):
    batches = make_task(0, device=device)
    plain = train(case, way, device, clip=[0.05])
    trained = Trained(case, way, device)
    for batch in batches:

        def closure(batch=batch):
            trained.optimizer.zero_grad()
            loss = loss_of(trained, batch)
            loss.backward()
            if way == "apart":
                trained.method.add_penalty_grad_()
            trained.method.clip_grad_norm_(0.05)
            return loss

        trained.optimizer.step(closure)
        if way == "apart":
            trained.method.update()
    assert_same_training(trained, plain)


def test_clearing_other_gradients_does_not_forget(device):
    """Of two optimizers with the method one clears, in place, and the other steps."""
    trained = Trained("si", "fused", device)
    part = optim.SGD(trained.model[2].parameters(), lr=0.1, method=trained.method)
    trained.backward(make_task(0, device=device)[0])
    trained.method.clip_grad_norm_(1e-3)
    part.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=REFUSED):
        trained.optimizer.step()
