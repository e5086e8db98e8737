"""What a method keeps: through a resume, a changed model, another device."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from naive_methods import CASES
from torch import nn
from toy_training import CLASSES, assert_same_state, make_model, make_task, train_steps, train_tasks

from clext import EWC, MAS, METHODS, SCP, SI, RWalk

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*was not called in this task:UserWarning"),
]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=METHODS)
def kind(request):
    return METHODS[request.param]


@pytest.mark.parametrize("task", [0, 1])
def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(case, device, task):
    kind, _, strength, options = case
    model = make_model().to(device)
    method = kind(model, strength=strength, **options)
    train_tasks(model, method, tasks=task)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batches = make_task(task, device=device)
    method.strength = 0.5 * strength
    train_steps(model, method, optimizer, batches[:6])

    buffer = io.BytesIO()
    parts = (model, optimizer, method)
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    resumed_model = make_model().to(device)
    resumed = kind(resumed_model, strength=7.0 if kind.has_strength else None, **options)
    resumed_optimizer = torch.optim.Adam(resumed_model.parameters(), lr=0.02)
    states = torch.load(buffer, weights_only=True)
    for part, state in zip((resumed_model, resumed_optimizer, resumed), states, strict=True):
        part.load_state_dict(state)

    for each in ((model, method, optimizer), (resumed_model, resumed, resumed_optimizer)):
        train_steps(*each, batches[6:])
        each[1].consolidate(batches)
        train_steps(*each, make_task(task + 1, device=device))
    for mine, theirs in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert_same_state(resumed.state_dict(), method.state_dict())


def test_state_dict_is_a_copy_and_loading_fills_the_existing_buffers(device):
    model = make_model().to(device)
    method = SI(model)
    train_tasks(model, method, tasks=1)
    saved = method.state_dict()
    pointers = [entry.data_ptr() for entry in method.importance.values()]
    kept = copy.deepcopy(saved)
    train_tasks(model, method, tasks=1)
    assert_same_state(saved, kept)
    method.load_state_dict(saved)
    assert_same_state(method.state_dict(), kept)
    assert [entry.data_ptr() for entry in method.importance.values()] == pointers


def changed(state, *path, value):
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("method",), "ewc", "rwalk: state_dict is of method 'ewc'"),
        (("state",), None, "missing state, unexpected nothing"),
        (("strength",), -1.0, "rwalk: strength must be"),
        (("counters", "interval_steps"), None, "missing interval_steps"),
        (("state", "fisher"), None, "missing fisher"),
        (("state", "score", "0.weight"), None, "missing 0.weight"),
        (("state", "score", "9.weight"), torch.zeros(1), "unexpected 9.weight"),
        (
            ("state", "score", "0.weight"),
            torch.zeros(2),
            r"\['0.weight'\] is \[2\], expected \[6, 5\]",
        ),
        (("state", "score", "0.weight"), 3, "is int, expected"),
        (("state", "score", "0.weight"), torch.full((6, 5), torch.nan), "holds NaN or infinity"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(path, value, message):
    method = RWalk(make_model())
    train_tasks(method.model, method, tasks=1)
    before = method.state_dict()
    other = RWalk(make_model()).state_dict()
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(changed(other, *path, value=value))
    assert_same_state(method.state_dict(), before)


@pytest.mark.parametrize("given", [None, [], "rwalk.pt"])
def test_what_is_no_state_is_refused(given):
    method = EWC(make_model())
    got = type(given).__name__
    with pytest.raises(ValueError, match=f"^ewc: state_dict is {got}, expected a dict as state_di"):
        method.load_state_dict(given)


COUNTERS = [
    *[("tasks", value) for value in ("abc", [1], -3, 2.7, 10**30, True, float("nan"))],
    *[("interval_steps", value) for value in ("abc", [1], -3, 2.7, 10**30)],
    *[("constant", value) for value in ("1e", [1], -1.0, float("nan"), float("inf"), True)],
]


@pytest.mark.parametrize(("counter", "value"), [*COUNTERS, ("tasks", None), ("constant", None)])
def test_counters_that_are_none_are_refused_and_change_nothing(counter, value):
    kind, options = (EWC, {"anchors": "all"}) if counter == "constant" else (RWalk, {})
    method = kind(make_model(), **options)
    train_tasks(method.model, method, tasks=1)
    before = method.state_dict()
    other = kind(make_model(), strength=3.0, **options).state_dict()
    other["counters"][counter] = value
    with pytest.raises(
        ValueError, match=rf"state_dict\['counters'\]: '{counter}' must be"
    ) as caught:
        method.load_state_dict(other)
    assert "\n" not in str(caught.value)
    assert_same_state(method.state_dict(), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        *[(k, torch.full((6, 5), -1e-9), "below 0") for k in ("importance", "fisher", "score")],
        ("importance", torch.ones(6, 5, dtype=torch.complex64), "is torch.complex64, .* real"),
        ("path", torch.ones(6, 5, dtype=torch.int64), "is torch.int64, .* real floating"),
        ("path", torch.ones(6, 5).to_sparse(), "torch.sparse_coo on cpu, expected a dense"),
        ("path", torch.ones(6, 5, device="meta"), "on meta, expected a dense"),
    ],
)
def test_tensors_that_no_training_leaves_are_refused(key, value, message):
    method = RWalk(make_model())
    train_tasks(method.model, method, tasks=1)
    before = method.state_dict()
    other = RWalk(make_model()).state_dict()
    other["state"][key]["0.weight"] = value
    with pytest.raises(ValueError, match=message):
        method.load_state_dict(other)
    assert_same_state(method.state_dict(), before)


def test_a_path_below_zero_is_loaded():
    method = RWalk(make_model())
    state = method.state_dict()
    state["state"]["path"]["0.weight"].fill_(-1.0)
    method.load_state_dict(state)
    assert_same_state(method.state_dict(), state)


def test_a_state_with_a_constant_is_for_an_ewc_with_all_anchors():
    """Another would keep the constant in its penalty for ever."""
    source = EWC(make_model(), anchors="all")
    train_tasks(source.model, source, tasks=2)
    assert source.constant > 0
    latest = EWC(make_model(), strength=3.0)
    before = latest.state_dict()
    with pytest.raises(ValueError, match='make the EWC with anchors="all"'):
        latest.load_state_dict(source.state_dict())
    assert_same_state(latest.state_dict(), before)
    EWC(make_model(), anchors="all").load_state_dict(source.state_dict())


# ------------------------------------------------------------------ which parameters


def test_frozen_and_tied_parameters_are_counted_rightly(kind, device):
    model = (
        nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, CLASSES)).to(device).double()
    )
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    method = kind(model)
    train_tasks(model, method, tasks=2)
    names = ["0.weight", "0.bias", "1.bias", "2.bias"]
    assert list(method.importance) == (names if kind.state_names else [])
    assert model[2].weight.grad is None
    assert repr(method).endswith("tasks=2; 38 parameters)")  # 25 + 5 + 5 + 3


def test_parameters_without_gradient_are_no_obstacle(kind, device):
    model = make_model().to(device)
    model.spare = nn.Linear(2, 2).to(device).double()
    model.forward = lambda x: model[2](model[1](model[0](x)))
    method = kind(model)
    before = model.spare.weight.detach().clone()
    train_tasks(model, method, tasks=2)
    assert torch.equal(model.spare.weight, before)


def test_sparse_gradient_is_refused_by_name(device):
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2)).to(device)
    method = SI(model)
    model(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(TypeError, match=r"grads\[0\] of parameter '0.weight' has layout"):
        method.add_penalty_grad_()
    with pytest.raises(TypeError, match="0.weight"):
        method.update()


@pytest.mark.parametrize("kind", [EWC, MAS, SI, RWalk, SCP])
def test_growing_head_keeps_its_importance_and_protects_new_rows_later(kind, device):
    model = make_model().to(device)
    method = kind(model)
    train_tasks(model, method, tasks=1)
    important = method.importance["2.weight"].clone()
    grown = nn.Linear(6, CLASSES + 2, device=device, dtype=torch.float64)
    with torch.no_grad():
        grown.weight[:CLASSES] = model[2].weight
        grown.bias[:CLASSES] = model[2].bias
    model[2] = grown
    method.refresh_parameters()
    assert torch.equal(method.importance["2.weight"][:CLASSES], important)
    assert method.importance["2.weight"][CLASSES:].eq(0).all()
    assert torch.equal(method.anchor["2.weight"], grown.weight)
    assert method.penalty().item() == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batches = [(x, y + 2) for x, y in make_task(1, device=device)]
    train_steps(model, method, optimizer, batches)
    method.consolidate(batches)
    assert method.importance["2.weight"][CLASSES:].gt(0).any()


@pytest.mark.parametrize("kind", [EWC, MAS, SI, RWalk, SCP])
def test_consolidate_follows_a_changed_model_by_itself(kind, device):
    model = make_model().to(device)
    method = kind(model)
    train_tasks(model, method, tasks=1)
    important = method.importance["0.weight"].clone()
    model[0].requires_grad_(False)  # protected still, though it cannot move now
    model[2] = nn.Linear(6, CLASSES, device=device, dtype=torch.float64)
    batches = make_task(1, device=device)
    train_steps(model, method, torch.optim.Adam(model[2].parameters()), batches)
    method.consolidate(batches)
    assert list(method.importance) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert model[0].weight.grad is None
    if kind is not RWalk:  # whose importance is scaled anew at each task
        assert torch.equal(method.importance["0.weight"], important)


def test_state_follows_the_model_to_another_device(device):
    model = make_model()
    method = SI(model)
    train_tasks(model, method, tasks=1)
    before = method.state_dict()
    if device != "cpu":
        with pytest.raises(ValueError, match="move the model first"):
            method.to(device)
    model.to(device)
    assert method.to(device) is method
    assert all(entry.device.type == device for entry in method.importance.values())
    for name, entry in method.importance.items():
        assert torch.equal(entry.cpu(), before["state"]["importance"][name])
    train_tasks(model, method, tasks=1)


def test_a_pickle_is_as_large_as_what_is_in_it(kind):
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(8)))
    size = len(pickle.dumps(model))
    assert len(pickle.dumps(kind(model))) < (len(kind.state_names) + 1) * 1.2 * size


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_with_the_model_go_on_alike(kind, how):
    model = make_model()
    method = kind(model)
    train_tasks(model, method, tasks=1)
    twin_model, twin = how((model, method))
    assert twin.model is twin_model
    for each in ((model, method), (twin_model, twin)):
        train_tasks(*each, tasks=2)
    assert_same_state(twin_model.state_dict(), model.state_dict())
    assert_same_state(twin.state_dict(), method.state_dict())
