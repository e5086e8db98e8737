"""The step as an event: what is kept when the pull is added, and what cannot leak into it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from condition_loops import WAYS, Defined, Trained, assert_agree
from toy_training import make_model, make_task

import clext
from clext import EWC, SI, RWalk, optim

pytestmark = pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")

PATHS = ("si", "rwalk", "rwalk released")
CHOSEN = ("baseline", "ewc", "ewc all", *PATHS)

every_case = pytest.mark.parametrize("case", CHOSEN)
every_path = pytest.mark.parametrize("case", PATHS)
every_way = pytest.mark.parametrize("way", WAYS)


def train_both(case, way, device, tasks=3, accumulate=1, **options):
    trained, defined = Trained(case, way, device), Defined(case, way)
    for number in range(tasks):
        batches = make_task(number)
        for i in range(0, len(batches), accumulate):
            group = batches[i : i + accumulate]
            trained.step(*[(x.to(device), y.to(device)) for x, y in group], **options)
            defined.step(*group, **options)
        trained.end_task([(x.to(device), y.to(device)) for x, y in batches])
        defined.end_task(batches)
    return trained, defined


# ------------------------------------------------------------------ what happens to gradients


@every_case
@every_way
def test_gradients_of_several_batches_are_one_step(case, way, device):
    assert_agree(*train_both(case, way, device, accumulate=3))


@every_case
@pytest.mark.parametrize("way", ["apart", "fused", "attached"])
def test_clipping_leaves_the_path_that_of_the_task(case, way, device):
    """Torch's own after the pull, or the option of the fused step; `attach` pulls after a clip."""
    assert_agree(*train_both(case, way, device, clip=0.05))


@every_path
def test_nothing_after_the_pull_counts(case, device):
    """Noise, values clipped, gradients cleared before update()."""
    results = []
    for meddle in (False, True):
        trained = Trained(case, "apart", device)
        for number in range(2):
            batches = make_task(number, device=device)
            for batch in batches:
                trained.backward(batch)
                trained.method.add_penalty_grad_()
                trained.optimizer.step()
                if meddle:
                    for parameter in trained.model.parameters():
                        parameter.grad.normal_()
                    trained.optimizer.zero_grad(set_to_none=False)
                trained.method.update()
            trained.end_task(batches)
        results.append(trained.method.importance)
    for name, entry in results[0].items():
        assert torch.equal(entry, results[1][name])
        assert bool(entry.any())


@every_path
@every_way
def test_weights_written_between_steps_are_no_movement(case, way, device):
    """Clamped, or swapped for an average: no step has done that."""
    trained = Trained(case, way, device)
    task = make_task(0, device=device)
    for batch in task:
        trained.step(batch)
    way_of_steps = [entry.clone() for entry in trained.method._state.lists["path"]]
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter.add_(10.0)
    before = [entry.clone() for entry in trained.method._state.lists["path"]]
    assert all(map(torch.equal, way_of_steps, before))
    start = [p.detach().clone() for p in trained.model.parameters()]
    trained.backward(task[0])
    gradient = [p.grad.clone() for p in trained.model.parameters()]
    trained.finish()
    if case == "si":
        for path, old, g, theta, was in zip(
            trained.method._state.lists["path"],
            before,
            gradient,
            trained.model.parameters(),
            start,
            strict=True,
        ):
            torch.testing.assert_close(path, old - g * (theta.detach() - was))


@every_path
def test_the_penalty_in_parts_of_the_loss_is_the_penalty_once(case, device):
    """In an accumulation: 1/k of penalty() in each of k losses, or add_penalty_grad_() once."""
    results = []
    for in_parts in (False, True):
        trained = Trained(case, "apart", device)
        for number in range(2):
            batches = make_task(number, device=device)
            for i in range(0, len(batches), 3):
                group = batches[i : i + 3]
                if not in_parts:
                    trained.step(*group)
                    continue
                trained.optimizer.zero_grad()
                for x, y in group:
                    loss = F.cross_entropy(trained.model(x), y) + trained.method.penalty()
                    (loss / len(group)).backward()
                trained.optimizer.step()
                trained.method.update()
            trained.end_task(batches)
        results.append(trained)
    for name, entry in results[0].method.importance.items():
        torch.testing.assert_close(entry, results[1].method.importance[name])


@pytest.mark.parametrize("case", ["ewc", "si", "rwalk"])
def test_the_strongest_pull_leaks_into_no_importance(case, device):
    """What it does is not what the task has taught."""
    trained, defined = Trained(case, "apart", device), Defined(case, "apart")
    trained.method.strength = defined.naive.strength = 50 * trained.method.strength
    for loop in (trained, defined):
        for number in range(2):
            batches = make_task(number, device=device if loop is trained else "cpu")
            for batch in batches:
                loop.step(batch)
            loop.end_task(batches)
    assert_agree(trained, defined, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", ["si", "rwalk"])
@every_way
def test_negative_importance_is_not_kept(case, way, device):
    """Weight decay goes uphill too, and then the path integral falls: a reward, as a penalty."""
    trained = Trained(case, way, device)
    options = {"method": trained.method} if way == "fused" else {}
    library = optim if way == "fused" else torch.optim
    params = trained.model.parameters()
    trained.optimizer = library.AdamW(params, lr=0.02, weight_decay=10.0, **options)
    uphill = False
    for number in range(2):
        batches = make_task(number, device=device)
        for batch in batches:
            trained.step(batch)
            path = trained.method._state.lists["path"]
            uphill |= any(bool(entry.lt(0).any()) for entry in path)
        trained.end_task(batches)
        assert all(bool(entry.ge(0).all()) for entry in trained.method.importance.values())
    assert uphill


# ------------------------------------------------------------------ calls too many or too few


@pytest.mark.parametrize("kind", [EWC, SI, RWalk])
def test_a_second_pull_onto_the_same_gradients_is_refused(kind, device):
    """As in an accumulation that pulls k times; the gradient is as after the first pull."""
    model = make_model().to(device)
    method = kind(model)
    method.importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    method.anchor = {name: p + 1.0 for name, p in model.named_parameters()}
    (x, y), (x2, y2) = make_task(0, device=device)[:2]
    F.cross_entropy(model(x), y).backward()
    method.add_penalty_grad_()
    once = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"in these gradients already .*once in a step"):
        method.add_penalty_grad_()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), once, strict=True))
    F.cross_entropy(model(x2), y2).backward()
    with pytest.raises(RuntimeError, match="in these gradients already"):
        method.add_penalty_grad_()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("case", ["ewc", "si"])
def test_a_step_that_was_dropped_leaves_nothing(case, set_to_none, device):
    """Nor does EWC without update() mind gradients that are cleared in place."""
    results = []
    for dropped in (False, True):
        trained = Trained(case, "apart", device)
        for number in range(2):
            batches = make_task(number, device=device)
            for batch in batches:
                trained.backward(batch)
                if dropped:
                    trained.method.add_penalty_grad_()
                    trained.optimizer.zero_grad(set_to_none)
                    trained.backward(batch, clear=False)
                trained.method.add_penalty_grad_()
                trained.optimizer.step()
                if case == "si":
                    trained.method.update()
                trained.optimizer.zero_grad(set_to_none)
            trained.end_task(batches)
        results.append(trained.method.importance)
    for name, entry in results[0].items():
        assert torch.equal(entry, results[1][name])


@pytest.mark.parametrize("kind", [SI, RWalk])
def test_an_update_without_a_step_says_what_to_do(kind):
    method = kind(make_model())
    with pytest.raises(RuntimeError, match=rf"{kind.name}: update\(\) saw no step; call add_pen"):
        method.update()


# ------------------------------------------------------------------ GradScaler, autocast


def train_scaled(case, way, device, *, poison):
    """Two tasks in float32 with a GradScaler; every third step is made to overflow."""
    trained = Trained(case, way, device, dtype=torch.float32)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14, growth_interval=10_000)
    for number in range(2):
        batches = make_task(number, torch.float32, device)
        for index, batch in enumerate(batches):
            if poison and index % 3 == 0:
                before = copy.deepcopy(trained.model.state_dict())
                trained.backward(batch, scaler=scaler)
                for parameter in trained.model.parameters():
                    parameter.grad.fill_(poison)
                trained.finish(scaler=scaler)
                assert all(torch.equal(p, before[n]) for n, p in trained.model.named_parameters())
                scaler.update(2.0**14)
            trained.step(batch, scaler=scaler)
        trained.end_task(batches)
    return trained


@pytest.mark.parametrize("way", ["apart", "scaled", "fused", "attached", "attached in step"])
@pytest.mark.parametrize("poison", [None, torch.inf])
@pytest.mark.parametrize("case", ["ewc", "si"])
def test_importance_is_not_scaled_and_skipped_steps_leave_no_trace(case, way, poison, device):
    """Unscaled before, or with `add_penalty_grad_(scaler)`; else nobody has to think of it."""
    defined = Defined(case, way, dtype=torch.float32)
    for number in range(2):
        batches = make_task(number, torch.float32)
        for batch in batches:
            defined.step(batch)
        defined.end_task(batches)
    assert_agree(train_scaled(case, way, device, poison=poison), defined, 2e-3, 2e-4)


@every_path
@every_way
def test_a_broken_step_is_refused_at_the_end_of_the_task(case, way, device):
    """Without a scaler the parameter moves to NaN: it must not turn into an importance."""
    trained = Trained(case, way, device)
    for number, batch in enumerate(make_task(0, device=device)):
        trained.backward(batch)
        if number == 5:
            trained.model[0].weight.grad[0, 0] = torch.nan
        trained.finish()
    assert any(bool(entry.isnan().any()) for entry in trained.method._state.lists["path"])
    with pytest.raises(ValueError, match=r"parameter '0.weight' holds NaN or infinity"):
        trained.end_task(None)
    assert trained.method.tasks == 0
    assert all(bool(entry.eq(0).all()) for entry in trained.method.importance.values())


@pytest.mark.parametrize("case", ["ewc", "si", "rwalk"])
@every_way
def test_a_forward_pass_in_half_precision(case, way):
    """Gradients and state are float32 all the same."""
    trained = Trained(case, way, dtype=torch.float32)
    defined = Defined(case, way, dtype=torch.float32)
    for number in range(2):
        batches = make_task(number, torch.float32)
        for batch in batches:
            for each in (trained, defined):
                each.step(batch, autocast=torch.bfloat16)
            # Roundings in half precision drift apart, slowly.
            for mine, theirs in zip(trained.model.parameters(), defined.naive.params, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-3)
        trained.end_task(batches)
        defined.end_task(batches)
    for entry in trained.method.importance.values():
        assert entry.dtype == torch.float32
        assert bool(entry.any())


# ------------------------------------------------------------------ what a reader has to follow


def entered(function):
    """The names of clext's Python functions that a call enters."""
    folder, names = str(Path(clext.__file__).parent), []

    def note(frame, event, _argument):
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            names.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize(("way", "most"), [("apart", 10), ("fused", 20)])
def test_a_step_of_si_is_a_handful_of_functions(way, most):
    trained = Trained("si", way)
    batches = make_task(0)
    trained.step(batches[0])
    trained.backward(batches[1])
    names = entered(trained.finish)
    assert len(set(names) if way == "apart" else names) <= most, names


@pytest.mark.parametrize("kind", [EWC, SI])
def test_the_penalty_is_part_of_a_compiled_loss(kind):
    """In one graph, which is not compiled anew from step to step."""
    counter = torch._dynamo.testing.CompileCounter()
    model = make_model()
    method = kind(model)
    method.importance = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    x, y = make_task(0)[0]

    def loss():
        return F.cross_entropy(model(x), y) + method.penalty()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(5):
        expected = F.cross_entropy(model(x), y).item() + method.penalty().item()
        value = compiled()
        assert value.item() == pytest.approx(expected)
        value.backward()
        optimizer.step()
        method.update()
        optimizer.zero_grad()
    assert counter.frame_count <= 2
    assert method.steps > 0


# ------------------------------------------------------------------ what users have done


@pytest.mark.parametrize("way", ["pull", "penalty"])
def test_an_update_that_was_left_out_shows_at_the_end_of_the_task(way):
    model = make_model()
    method, optimizer = SI(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in make_task(0):
        loss = F.cross_entropy(model(x), y)
        (loss + method.penalty() if way == "penalty" else loss).backward()
        if way == "pull":
            method.add_penalty_grad_()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="si saw no step of this task"):
        method.consolidate()
    assert method.tasks == 1


def test_gradients_cleared_before_the_penalty_could_be_taken_out_of_them():
    model = make_model()
    method = SI(model)
    (F.cross_entropy(model(make_task(0)[0][0]), make_task(0)[0][1]) + method.penalty()).backward()
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"call update\(\) before zero_grad\(\)"):
        method.update()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_penalty_that_was_only_looked_at_begins_no_step():
    model = make_model()
    method, optimizer = SI(model), torch.optim.SGD(model.parameters(), lr=0.1)
    method.penalty()  # for a log, say
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(5.0)
    start = [p.detach().clone() for p in model.parameters()]
    x, y = make_task(0)[0]
    (F.cross_entropy(model(x), y) + method.penalty()).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    method.update()
    for path, g, theta, was in zip(
        method._state.lists["path"], gradients, model.parameters(), start, strict=True
    ):
        torch.testing.assert_close(path, -g * (theta.detach() - was))


def test_gradients_that_are_unscaled_already_are_not_divided_again():
    results = []
    for given in (False, True):
        trained = Trained("si", "apart", dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu")
        for batch in make_task(0, torch.float32):
            trained.backward(batch, scaler=scaler)
            scaler.unscale_(trained.optimizer)
            trained.method.add_penalty_grad_(scaler if given else None)
            scaler.step(trained.optimizer)
            scaler.update()
            trained.method.update()
        results.append(trained.method._state.lists["path"])
    assert all(map(torch.equal, *results))
