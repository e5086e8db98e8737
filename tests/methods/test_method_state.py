"""What a method keeps: written by hand, through a resume, as a copy, in another process."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from naive_methods import CASES
from toy_training import assert_same_state, make_model, make_task, train_steps, train_tasks

from clext import EWC, L2, MAS, METHODS, SCP, SI, Baseline, RWalk

pytestmark = [
    pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning"),
    pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning"),
]

PULLING = [EWC, L2, MAS, SI, RWalk, SCP]
every_kind = pytest.mark.parametrize("kind", [*PULLING, Baseline])  # others: test_kept_data


# ------------------------------------------------------------------ written by hand


@pytest.mark.parametrize("kind", PULLING)
@pytest.mark.parametrize("how", ["item", "whole", "in place"])
def test_a_written_importance_counts(kind, how, device):
    model = make_model().to(device)
    method = kind(model, strength=2.0)
    ones = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    if how == "item":
        method.importance["2.bias"] = ones["2.bias"]
    elif how == "whole":
        method.importance = {name: entry * (name == "2.bias") for name, entry in ones.items()}
    else:
        method.importance["2.bias"].fill_(1.0)
    assert method.penalty().item() == 0
    with torch.no_grad():
        model[2].bias.add_(1.0)
    assert method.penalty().item() == pytest.approx(2.0 * 3)
    assert method.add_penalty_grad_().item() == pytest.approx(2.0 * 3)
    method.anchor["2.bias"] = model[2].bias
    assert method.penalty().item() == 0


@pytest.mark.parametrize("kind", [EWC, SI])
def test_what_is_no_importance_is_refused(kind):
    method = kind(make_model())
    with pytest.raises(ValueError, match=r"importance has no entry 'bias': no such parameter"):
        method.importance["bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"importance\['2.bias'\] is \[4\], expected \[3\]"):
        method.importance = {"0.bias": torch.ones(6), "2.bias": torch.ones(4)}
    assert not any(bool(entry.any()) for entry in method.importance.values())


# ------------------------------------------------------------------ resumed


@pytest.mark.parametrize("task", [0, 1])
@pytest.mark.parametrize(
    "case", ["baseline", "l2", "ewc", "ewc all", "mas", "si", "si total", "rwalk", "rwalk released"]
)
def test_training_goes_on_after_a_resume_as_if_it_had_not_stopped(case, device, task):
    kind, _, strength, options = CASES[case]
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


def test_a_state_of_the_first_version_is_taken():
    """It had the parameters before the last step, no count of steps, and entries for every kind."""
    method = SI(make_model())
    train_tasks(method.model, method, tasks=1)
    state = method.state_dict()
    old = copy.deepcopy(state)
    old["state"]["previous"] = {name: p.detach() for name, p in method.model.named_parameters()}
    del old["counters"]["steps"]
    old |= {"extra": {}, "rehearsal": None}
    other = SI(make_model())
    other.load_state_dict(old)
    assert_same_state(other.state_dict(), state)


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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("method",), "ewc", "it is of method 'ewc', not 'rwalk'"),
        (("state",), None, "'state'"),
        (("strength",), -1.0, "rwalk: strength must be"),
        (("counters", "interval_steps"), [1], "int"),
        (("state", "score"), None, "'score'"),
        (("state", "score", "0.weight"), None, "'score' is of other parameters: 0.weight"),
        (("state", "score", "9.weight"), torch.zeros(1), "of other parameters: 9.weight"),
        (("state", "score", "0.weight"), torch.zeros(2), r"is \[2\], expected \[6, 5\]"),
        (("state", "score", "0.weight"), 3, "is int, expected"),
        (("outputs", "blocks"), 3, "int"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(path, value, message):
    method = RWalk(make_model())
    train_tasks(method.model, method, tasks=1)
    before = method.state_dict()
    place = state = RWalk(make_model(), strength=3.0).state_dict()
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=f"rwalk: the state does not fit: .*{message}") as caught:
        method.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert_same_state(method.state_dict(), before)


@pytest.mark.parametrize("given", [None, [], "rwalk.pt"])
def test_what_is_no_state_is_refused(given):
    with pytest.raises(ValueError, match=r"^ewc: the state does not fit: "):
        EWC(make_model()).load_state_dict(given)


def test_a_state_with_a_constant_is_for_an_ewc_with_all_anchors():
    """Another would keep the constant in its penalty for ever."""
    source = EWC(make_model(), anchors="all")
    train_tasks(source.model, source, tasks=2)
    assert source.constant > 0
    latest = EWC(make_model(), strength=3.0)
    before = latest.state_dict()
    with pytest.raises(ValueError, match='it is of an EWC with anchors="all"; make this one so'):
        latest.load_state_dict(source.state_dict())
    assert_same_state(latest.state_dict(), before)
    EWC(make_model(), anchors="all").load_state_dict(source.state_dict())


@pytest.mark.parametrize(("saved", "loaded"), [("paper", "released"), ("released", "paper")])
def test_the_state_of_another_variant_is_refused_or_taken_as_far_as_it_goes(saved, loaded):
    state = RWalk(make_model(), variant=saved).state_dict()
    method = RWalk(make_model(), variant=loaded)
    if loaded == "released":
        with pytest.raises(ValueError, match="running_fisher"):
            method.load_state_dict(state)
    else:
        method.load_state_dict(state)


# ------------------------------------------------------------------ copied


@pytest.mark.parametrize("kind", METHODS.values())
def test_a_pickle_is_as_large_as_what_is_in_it(kind):
    model = torch.nn.Sequential(*(torch.nn.Linear(40, 40) for _ in range(8)))
    size = len(pickle.dumps(model))
    lists = len(getattr(kind, "state_names", ()))
    assert len(pickle.dumps(kind(model))) < (lists + 1) * 1.2 * size


@every_kind
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


def test_a_copy_of_a_model_in_another_layout_by_now_has_its_state():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 2), torch.nn.Flatten(), torch.nn.Linear(3, 2))
    method = EWC(model)
    method.importance["0.weight"] = torch.arange(24.0).view(3, 2, 2, 2)
    model.to(memory_format=torch.channels_last)
    for twin in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert torch.equal(twin.importance["0.weight"], method.importance["0.weight"])
    model.double()
    twin = copy.deepcopy(method)
    assert torch.equal(twin.importance["0.weight"], method.importance["0.weight"].double())


def test_a_copy_in_mid_step_knows_of_no_step():
    method = SI(make_model())
    x, y = make_task(0)[0]
    torch.nn.functional.cross_entropy(method.model(x), y).backward()
    method.add_penalty_grad_()
    twin = copy.deepcopy(method)
    with pytest.raises(RuntimeError, match="saw no step"):
        twin.update()
    method.update()
