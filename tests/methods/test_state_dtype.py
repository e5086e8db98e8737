"""Anchor and importance in bfloat16: the same method, with these two rounded after each task."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from toy_training import make_model, make_task, train_steps

from clext import EWC, L2, MAS, SCP, SI, RWalk, optim

pytestmark = pytest.mark.filterwarnings("ignore:.*saw no step of this task:UserWarning")

PULLING = [EWC, L2, MAS, SI, RWalk, SCP]
every_kind = pytest.mark.parametrize("kind", PULLING)
COMPACT = {"state_dtype": torch.bfloat16}


def rounded(tensors):
    return {name: entry.bfloat16() for name, entry in tensors.items()}


def train(model, method, number, fused):
    batches = make_task(number, model[0].weight.dtype, model[0].weight.device)
    if not fused:
        train_steps(model, method, torch.optim.Adam(model.parameters(), lr=0.02), batches)
        return batches
    optimizer = optim.Adam(model.parameters(), lr=0.02, method=method)
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return batches


def take_over(plain, compact):
    """The numbers of a method with compact state, in float32."""
    plain.anchor, plain.importance = compact.anchor, compact.importance


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EWC, {}),
        (EWC, {"anchors": "all", "gamma": 0.7}),
        (SI, {}),
        (RWalk, {}),
        (RWalk, {"variant": "released", "interval": 4}),
    ],
)
@pytest.mark.parametrize("fused", [False, True], ids=["by hand", "fused"])
def test_trains_to_the_bit_as_with_the_same_numbers_in_float32(kind, options, fused, device, plan):
    models = [make_model(torch.float32).to(device) for _ in range(2)]
    plain, compact = kind(models[0], **options), kind(models[1], **COMPACT, **options)
    for number in range(2):
        take_over(plain, compact)
        for model, method in zip(models, (plain, compact), strict=True):
            method.consolidate(train(model, method, number, fused))
        for mine, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
            assert torch.equal(mine, theirs)
        for key, entries in compact._state.lists.items():
            wide = plain._state.lists[key]
            for entry, exact in zip(entries, wide, strict=True):
                is_compact = key in ("anchor", "importance")
                assert entry.dtype == (torch.bfloat16 if is_compact else torch.float32)
                assert torch.equal(entry, exact.to(entry.dtype)), key
    take_over(plain, compact)
    assert compact.penalty().item() == pytest.approx(plain.penalty().item(), rel=1e-6)
    assert any(bool(entry.any()) for entry in compact.importance.values())


@pytest.mark.parametrize("kind", [SI, RWalk])
def test_a_penalty_in_the_loss_is_taken_out_again(kind, device):
    methods = [kind(make_model(torch.float32).to(device), **options) for options in ({}, COMPACT)]
    for method in methods:
        method.importance = {n: torch.ones_like(p) for n, p in method.model.named_parameters()}
        for entry in method.anchor.values():
            entry.fill_(0.5)
        x, y = make_task(0, torch.float32, device)[0]
        (F.cross_entropy(method.model(x), y) + method.penalty()).backward()
        torch.optim.SGD(method.model.parameters(), lr=0.1).step()
        method.update()
    paths = [method._state.lists["path"] for method in methods]
    for mine, theirs in zip(*paths, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        assert mine.any()


def test_half_the_memory():
    model = torch.nn.Linear(1024, 1024)
    sizes = [
        sum(entry.nbytes for name in ("anchor", "importance") for entry in state[name].values())
        for state in (EWC(model, **options).state_dict()["state"] for options in ({}, COMPACT))
    ]
    assert sizes == [8 * 1025 * 1024, 4 * 1025 * 1024]


@every_kind
def test_a_state_is_loaded_from_the_other_dtype(kind, device):
    model = make_model(torch.float32).to(device)
    plain, compact = kind(model), kind(model, state_dtype="bfloat16")
    plain.consolidate(train(model, plain, 0, fused=False))
    compact.load_state_dict(plain.state_dict())
    for name in ("anchor", "importance"):
        mine, theirs = getattr(compact, name), rounded(getattr(plain, name))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    plain.load_state_dict(compact.state_dict())
    assert plain.anchor["0.weight"].dtype == torch.float32
    assert plain.penalty().item() == pytest.approx(compact.penalty().item())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_the_dtype(how):
    method = SI(make_model(torch.float32), **COMPACT)
    method.consolidate(train(method.model, method, 0, fused=False))
    other = how(method)
    for name, entry in method.importance.items():
        assert other.importance[name].dtype == torch.bfloat16
        assert torch.equal(other.importance[name], entry)
    assert other._state.lists["path"][0].dtype == torch.float32
    assert other.state_dtype == torch.bfloat16


def test_follows_a_head_that_grows_and_a_conversion(device):
    model = make_model(torch.float32).to(device)
    method = EWC(model, **COMPACT)
    method.consolidate(train(model, method, 0, fused=False))
    known = {name: entry.clone() for name, entry in method.importance.items()}
    head = torch.nn.Linear(6, 5).to(device)
    with torch.no_grad():
        head.weight[:3], head.bias[:3] = model[2].weight, model[2].bias
    model[2] = head
    method.refresh_parameters()
    assert method.importance["2.weight"].dtype == torch.bfloat16
    assert torch.equal(method.importance["2.weight"][:3], known["2.weight"])
    assert not method.importance["2.weight"][3:].any()
    model.bfloat16()
    assert method.penalty().item() >= 0
    assert torch.equal(method.importance["2.weight"][:3], known["2.weight"])


def test_float64_parameters_have_float64_state():
    message = r"parameter '0.weight' is float64, whose state is float64: leave state_dtype=torch.b"
    with pytest.raises(ValueError, match=message):
        EWC(make_model(torch.float64), **COMPACT)
    method = EWC(make_model(torch.float32), **COMPACT)
    method.model.double()
    with pytest.raises(ValueError, match=message):
        method.begin_task()


@every_kind
@pytest.mark.parametrize("value", [torch.float16, "half", 16])
def test_other_dtypes_are_refused(kind, value):
    with pytest.raises(ValueError, match="state_dtype must be torch.bfloat16 or None, got "):
        kind(make_model(torch.float32), state_dtype=value)
