"""Each method against a slow, obvious implementation, over several tasks of real training steps."""

from __future__ import annotations

import pytest
import torch
from naive_methods import CASES
from torch import nn
from toy_training import (
    CLASSES,
    FEATURES,
    assert_same_state,
    make_model,
    make_task,
    train_steps,
    train_tasks,
)

from clext import EWC, L2, MAS, METHODS, SCP, SI, Baseline, RWalk
from clext.ops.plan import ReferencePlan

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
]

PULLING = [EWC, L2, MAS, SI, RWalk, SCP]


@pytest.fixture(params=METHODS)
def kind(request):
    return METHODS[request.param]


@pytest.mark.parametrize("case", CASES)
def test_method_trains_like_its_definition(case, device, plan):
    kind, naive_kind, strength, options = CASES[case]
    naive = naive_kind(make_model(), strength)
    for name, value in options.items():
        setattr(naive, {"fisher": "kind"}.get(name, name), value)
    naive.train()

    model = make_model().to(device)
    method = kind(model, strength=strength, **options)
    assert kind is Baseline or isinstance(method._state.plan, ReferencePlan) == (plan != "compiled")
    train_tasks(model, method)

    def compare(got, expected):
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-7, atol=1e-9)

    compare([p.detach() for p in model.parameters()], naive.now())
    assert method.penalty().item() == pytest.approx(naive.penalty().item(), rel=1e-6)
    if kind is not Baseline:
        compare(method.importance.values(), naive.omega)
        if options.get("anchors") != "all":
            compare(method.anchor.values(), naive.anchor)
        assert all(bool((entry >= 0).all()) for entry in method.importance.values())
        assert any(bool((entry > 0).any()) for entry in method.importance.values())


@pytest.mark.parametrize("case", ["baseline", "ewc", "ewc all", "rwalk"])
def test_added_gradient_is_that_of_the_penalty(case, device, plan):
    kind, _, strength, options = CASES[case]
    model = make_model().to(device)
    method = kind(model, strength=strength, **options)
    train_tasks(model, method, tasks=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    (penalty := method.penalty()).requires_grad and penalty.backward()
    expected = [p.grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    value = method.add_penalty_grad_()
    assert value.shape == penalty.shape == ()
    torch.testing.assert_close(value, penalty.detach())
    assert kind is Baseline or value > 0
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)


def test_penalty_is_zero_during_the_first_task(kind, device):
    model = make_model().to(device)
    method = kind(model)
    train_steps(
        model, method, torch.optim.SGD(model.parameters(), 0.1), make_task(0, device=device)
    )
    assert method.penalty().item() == 0
    assert method.add_penalty_grad_().item() == 0


@pytest.mark.parametrize("kind", PULLING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_models_keep_float32_state(kind, device, dtype):
    model = make_model(dtype).to(device)
    method = kind(model)
    train_tasks(model, method, tasks=2)
    for entry in (*method.importance.values(), *method.anchor.values()):
        assert entry.dtype == torch.float32
        assert bool(entry.isfinite().all())


def test_strength_may_change_between_steps(device):
    model = make_model().to(device)
    method = EWC(model, strength=1.0)
    train_tasks(model, method, tasks=1)
    with torch.no_grad():
        model[0].weight.add_(1.0)
    before = method.penalty().item()
    method.strength = 3.0
    assert method.penalty().item() == pytest.approx(3 * before)
    assert method.add_penalty_grad_().item() == pytest.approx(3 * before)


@pytest.mark.parametrize("kind", [EWC, MAS, SCP])
@pytest.mark.parametrize("data", [None, [], [("x", "y")]], ids=str)
def test_failed_consolidation_changes_nothing(kind, data):
    method = kind(make_model())
    train_tasks(method.model, method, tasks=1)
    before = method.state_dict()
    with pytest.raises(ValueError, match="expected"):
        method.consolidate(data)
    assert_same_state(method.state_dict(), before)


def test_a_task_may_end_in_inference_mode(kind, device):
    """What is kept can still be learned from, and is the same."""
    states = []
    for mode in (False, True):
        model = make_model(torch.float32).to(device)
        method = kind(model)
        for number in range(2):
            batches = make_task(number, torch.float32, device)
            examples = tuple(torch.cat(entries) for entries in zip(*batches, strict=True))
            data = method.begin_task((examples[0].sigmoid(), examples[1]))
            method.loss(*(entry[:4] for entry in data)).backward()
            method.add_penalty_grad_()
            model.zero_grad()
            with torch.inference_mode(mode):
                method.consolidate([(examples[0].sigmoid(), examples[1])])
        states.append(method.state_dict())
    assert_same_state(*states)


def test_consolidation_leaves_modes_and_batch_statistics_alone(kind, device):
    model = nn.Sequential(
        nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, CLASSES)
    )
    model.to(device).double().train()
    model[2].eval()
    method = kind(model)
    before = [buffer.clone() for buffer in model.buffers()]
    method.consolidate(make_task(0, device=device))
    assert [module.training for module in model.modules()] == [True, True, True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
