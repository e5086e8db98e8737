"""Real training steps: accumulated, clipped, scaled, in half precision. Methods stay their own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from condition_loops import WAYS, Defined, Trained, assert_agree
from naive_methods import CASES
from toy_training import STEPS, make_model, make_task

from clext import SI

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
]

PATHS = ("si", "rwalk", "rwalk released")

every_case = pytest.mark.parametrize("case", CASES)
every_path = pytest.mark.parametrize("case", PATHS)
every_way = pytest.mark.parametrize("way", WAYS)


def in_groups(batches, size):
    return [batches[i : i + size] for i in range(0, len(batches), size)]


def train_both(case, way, device, tasks=3, accumulate=1, **options):
    trained, defined = Trained(case, way, device), Defined(case, way)
    for number in range(tasks):
        batches = make_task(number)
        for group in in_groups(batches, accumulate):
            trained.step(*[(x.to(device), y.to(device)) for x, y in group], **options)
            defined.step(*group, **options)
        trained.end_task([(x.to(device), y.to(device)) for x, y in batches])
        defined.end_task(batches)
    return trained, defined


# ------------------------------------------------------------------ accumulation, clipping


@every_case
@every_way
def test_gradients_of_several_batches_are_one_step(case, way, device):
    assert_agree(*train_both(case, way, device, accumulate=3))


@every_path
@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_penalty_in_parts_of_the_loss_is_the_penalty_once(case, clip, device):
    """In an accumulation: 1/k of penalty() in each of k losses, or add_penalty_grad_() once."""
    results = []
    for in_parts in (False, True):
        trained = Trained(case, "apart", device)
        for number in range(2):
            batches = make_task(number, device=device)
            for group in in_groups(batches, 3):
                if not in_parts:
                    trained.step(*group, clip=[clip] if clip else None)
                    continue
                trained.optimizer.zero_grad()
                for x, y in group:
                    loss = F.cross_entropy(trained.model(x), y) + trained.method.penalty()
                    (loss / len(group)).backward()
                if clip:
                    trained.method.clip_grad_norm_(clip)
                trained.optimizer.step()
                trained.method.update()
            trained.end_task(batches)
        results.append(trained)
    for name, entry in results[0].method.importance.items():
        torch.testing.assert_close(entry, results[1].method.importance[name])


@every_case
@every_way
def test_clipping_leaves_the_path_that_of_the_task(case, way, device, plan):
    """The movement is the clipped gradient's, the gradient is the task's own."""
    assert_agree(*train_both(case, way, device, clip=[0.05]))


@every_path
@every_way
def test_several_clippings_multiply(case, way, device):
    assert_agree(*train_both(case, way, device, clip=[0.3, 0.05]))


@pytest.mark.parametrize("case", ["ewc", *PATHS])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, torch.inf])
def test_clipping_is_that_of_torch(case, norm_type, device):
    model = make_model(torch.float32).to(device)
    method = CASES[case][0](model)
    for parameter in list(model.parameters())[1:]:  # one has no gradient
        parameter.grad = torch.randn_like(parameter)
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.grad = None if mine.grad is None else mine.grad.clone()
    norm = method.clip_grad_norm_(0.5, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5, norm_type)
    assert torch.equal(norm, expected)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad)


@every_path
@every_way
def test_a_clipping_counts_for_one_step(case, way, device):
    trained, defined = Trained(case, way, device), Defined(case, way)
    batches = make_task(0)
    for number, (x, y) in enumerate(batches):
        clip = [0.05] if number % 2 else None
        trained.step((x.to(device), y.to(device)), clip=clip)
        defined.step((x, y), clip=clip)
    trained.end_task(None)
    defined.end_task(None)
    assert_agree(trained, defined)


@every_path
@every_way
def test_clipping_to_nothing_teaches_nothing(case, way, device):
    """With momentum the parameters move on; what of the gradient made them is not known."""
    trained = Trained(case, way, device)
    batches = make_task(0, device=device)
    trained.step(batches[0])
    before = {
        key: [entry.clone() for entry in trained.method._state.lists[key]]
        for key in ("path", "fisher")
        if key in trained.method._state.lists
    }
    trained.step(batches[1], clip=[0.0])
    for key, entries in before.items():
        for mine, theirs in zip(trained.method._state.lists[key], entries, strict=True):
            assert torch.equal(mine, theirs)


@every_path
def test_what_was_clipped_for_a_step_that_never_came_is_forgotten(case, device):
    """Clipped, and then cleared without a step or an update()."""
    results = []
    for abandoned in (False, True):
        trained = Trained(case, "apart", device)
        for batch in make_task(0, device=device):
            if abandoned:
                trained.backward(batch)
                trained.method.add_penalty_grad_()
                trained.method.clip_grad_norm_(1e-3)
            trained.step(batch, clip=[0.05])
        trained.end_task(None)
        results.append(trained.method.importance)
    for name, entry in results[0].items():
        assert torch.equal(entry, results[1][name])


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), "1", None, True])
def test_a_bad_max_norm_is_refused(max_norm):
    method = SI(make_model())
    with pytest.raises(ValueError, match="si: max_norm must be a number >= 0, got"):
        method.clip_grad_norm_(max_norm)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, float("nan"), "inf", None, True])
def test_a_bad_norm_type_is_refused(norm_type):
    method = SI(make_model())
    with pytest.raises(ValueError, match="si: norm_type must be a number > 0 or inf, got"):
        method.clip_grad_norm_(1.0, norm_type)


@every_way
def test_an_infinite_max_norm_leaves_gradients_as_they_are(way, device):
    trained = Trained("si", way, device)
    trained.backward(make_task(0, device=device)[0])
    trained.model[0].weight.grad[0, 0] = torch.inf
    before = [p.grad.clone() for p in trained.model.parameters()]
    assert trained.method.clip_grad_norm_(torch.inf).isinf()
    for parameter, grad in zip(trained.model.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, grad)


# ------------------------------------------------------------------ gradients that others change


CHANGES = {
    "torch's clipping": lambda m: torch.nn.utils.clip_grad_norm_(m.parameters(), 0.05),
    "an edit": lambda m: m[0].weight.grad.mul_(2),
    "another tensor": lambda m: setattr(m[0].weight, "grad", m[0].weight.grad.clone()),
    "a backward pass": lambda m: m(make_task(0)[0][0].to(m[0].weight)).sum().backward(),
}


@every_path
@pytest.mark.parametrize("change", CHANGES)
def test_changed_gradients_are_refused_before_the_step(case, change, device, plan):
    trained = Trained(case, "apart", device)
    trained.backward(make_task(0, device=device)[0])
    trained.method.add_penalty_grad_()
    CHANGES[change](trained.model)
    before = copy.deepcopy(trained.model.state_dict())
    name = trained.method.name
    with pytest.raises(
        RuntimeError, match=rf"{name}: the gradients were changed .*clip_grad_norm_"
    ):
        trained.optimizer.step()
    for key, entry in trained.model.state_dict().items():
        assert torch.equal(entry, before[key])
    trained.step(make_task(0, device=device)[0])  # and all is well again


@pytest.mark.parametrize(
    "options",
    [{"fused": True}, {"foreach": True}, {"foreach": False}, {"fused": True, "maximize": True}],
    ids=str,
)
@every_path
def test_steps_that_write_to_gradients_raise_no_alarm(case, options, device):
    """torch's fused steps do; and of two optimizers the second sees what the first has done."""
    trained = Trained(case, "apart", device)
    halves = [trained.model[0].parameters(), trained.model[2].parameters()]
    optimizers = [torch.optim.Adam(half, **options) for half in halves]
    other = torch.optim.SGD([torch.ones(2, device=device, requires_grad=True)], lr=0.1)
    for batch in make_task(0, device=device):
        trained.backward(batch)
        trained.method.add_penalty_grad_()
        trained.method.clip_grad_norm_(0.1)
        other.step()  # of something else
        for optimizer in reversed(optimizers):
            optimizer.step()
        trained.method.update()


def test_a_change_after_another_models_step_is_still_seen(device):
    trained = Trained("si", "apart", device)
    trained.backward(make_task(0, device=device)[0])
    trained.method.add_penalty_grad_()
    torch.optim.SGD([torch.ones(2, device=device, requires_grad=True)], lr=0.1).step()
    CHANGES["an edit"](trained.model)
    with pytest.raises(RuntimeError, match="the gradients were changed"):
        trained.optimizer.step()


def test_methods_without_a_path_do_not_mind(device):
    trained = Trained("ewc", "apart", device)
    trained.backward(make_task(0, device=device)[0])
    trained.method.add_penalty_grad_()
    CHANGES["torch's clipping"](trained.model)
    trained.optimizer.step()


# ------------------------------------------------------------------ GradScaler, autocast


def train_scaled(case, way, device, *, poison, clip=None):
    """Two tasks in float32 with a GradScaler; every third step is made to overflow."""
    trained = Trained(case, way, device, dtype=torch.float32)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**14, growth_interval=10_000)
    skipped = 0
    for number in range(2):
        batches = make_task(number, torch.float32, device)
        for index, batch in enumerate(batches):
            if poison and index % 3 == 0:
                before = copy.deepcopy(trained.model.state_dict())
                trained.backward(batch, scaler=scaler)
                for parameter in trained.model.parameters():
                    parameter.grad.fill_(poison)
                trained.finish(clip, scaler)
                skipped += 1
                assert all(torch.equal(p, before[n]) for n, p in trained.model.named_parameters())
                scaler.update(2.0**14)
            trained.step(batch, scaler=scaler, clip=clip)
        trained.end_task(batches)
    assert (skipped > 0) == (poison is not None)
    return trained


# RWalk's intervals count the steps that are skipped too, unless nothing tells the method of them.
SCALED = [
    (case, way, poison)
    for case in CASES
    for way in WAYS
    for poison in (None, torch.inf, torch.nan)
    if poison is None
    or case not in ("rwalk", "rwalk released")
    or (case, way) == ("rwalk released", "fused")
]


@pytest.mark.parametrize(("case", "way", "poison"), SCALED, ids=str)
@pytest.mark.parametrize("clip", [None, [0.05]], ids=["whole", "clipped"])
def test_importance_is_not_scaled_and_skipped_steps_leave_no_trace(
    case, way, clip, poison, device, monkeypatch
):
    if case == "rwalk whole":  # one interval for the task
        monkeypatch.setitem(CASES[case][3], "interval", 2 * STEPS)
    defined = Defined(case, way, dtype=torch.float32)
    for number in range(2):
        batches = make_task(number, torch.float32)
        for batch in batches:
            defined.step(batch, clip=clip)
        defined.end_task(batches)
    assert_agree(train_scaled(case, way, device, poison=poison, clip=clip), defined, 2e-3, 2e-4)


@every_path
@every_way
def test_a_broken_step_shows_and_is_refused_at_the_end_of_the_task(case, way, device):
    """Without a scaler the parameter moves to NaN: it must not turn into an importance."""
    trained = Trained(case, way, device)
    batches = make_task(0, device=device)
    for number, batch in enumerate(batches):
        trained.backward(batch)
        if number == 5:
            trained.model[0].weight.grad[0, 0] = torch.nan
        trained.finish()
    assert any(bool(entry.isnan().any()) for entry in trained.method._state.lists["path"])
    before = trained.method.state_dict()
    with pytest.raises(ValueError, match=r"parameter '0.weight' holds NaN or infinity"):
        trained.end_task(None)
    after = trained.method.state_dict()
    assert after["counters"] == before["counters"]
    for key, entries in before["state"].items():
        for name, entry in entries.items():
            assert torch.equal(after["state"][key][name].nan_to_num(7), entry.nan_to_num(7))


@every_path
def test_a_broken_path_is_refused_though_the_parameters_are_fine(case, device):
    trained = Trained(case, "apart", device)
    batches = make_task(0, device=device)
    trained.step(batches[0])
    trained.backward(batches[1])
    trained.method.add_penalty_grad_()
    trained.optimizer.step()
    trained.model[2].bias.grad.fill_(torch.nan)  # a gradient that was not that of the step
    trained.method.update()
    with pytest.raises(ValueError, match=r"path of parameter '2.bias' holds NaN or infinity"):
        trained.end_task(None)


@every_case
@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_forward_pass_in_half_precision(case, way, dtype):
    """Gradients and state are float32 all the same."""
    trained = Trained(case, way, dtype=torch.float32)
    defined = Defined(case, way, dtype=torch.float32)
    for number in range(2):
        batches = make_task(number, torch.float32)
        for batch in batches:
            for each in (trained, defined):
                each.step(batch, autocast=dtype)
            # Roundings in half precision drift apart, slowly.
            for mine, theirs in zip(trained.model.parameters(), defined.naive.params, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-3)
        trained.end_task(batches)
        defined.end_task(batches)
    for entry in trained.method.importance.values():
        assert entry.dtype == torch.float32
        assert bool(entry.isfinite().all())
        assert bool(entry.any())
