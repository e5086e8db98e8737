"""Two methods on one model: the penalty of one, the loss of the other."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from quick_runs import QUICK, same, small, weights
from torch import nn
from toy_training import assert_same_state

import clext
from clext.methods import METHODS, make_method

LEARNERS = [name for name, kind in METHODS.items() if kind.has_own_loss]
PROTECTORS = [name for name, kind in METHODS.items() if kind.has_penalty]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    random = torch.Generator().manual_seed(seed)
    return [
        (torch.rand(8, 4, generator=random), torch.randint(3, (8,), generator=random))
        for _ in range(3)
    ]


# ------------------------------------------------------------------ by name


@pytest.mark.parametrize("given", ["ewc+replay", ["replay", "ewc"], "ewc + replay "])
def test_two_names_in_any_order(given):
    method = make_method(given, model(), strength=3.0, budget=7, fisher="exact", seed=5)
    assert method.name == "ewc+replay"
    ewc, replay = method.parts
    assert isinstance(ewc, clext.EWC)
    assert isinstance(replay, clext.Replay)
    assert (ewc.strength, ewc.fisher, ewc.seed) == (3.0, "exact", 5)
    assert (replay.strength, replay.budget, replay.seed) == (1.0, 7, 5)


def test_an_option_with_the_name_of_a_part_goes_there_alone():
    options = {"replay.strength": 3, "replay.seed": 6, "seed": 5, "ewc.gamma": 0.5}
    ewc, replay = make_method("replay+ewc", model(), strength=7.0, **options).parts
    assert (ewc.strength, ewc.gamma, ewc.seed) == (7.0, 0.5, 5)
    assert (replay.strength, replay.seed) == (3.0, 6)
    ewc, replay = make_method("ewc+replay", model(), strength=7.0, **{"ewc.strength": 2}).parts
    assert (ewc.strength, replay.strength) == (2.0, 1.0)
    gem, lwf = make_method("gem+lwf", model(), strength=7.0).parts
    assert (gem.strength, lwf.strength) == (0.0, 7.0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("reply.strength", "unknown part of ewc.replay in option 'reply.*mean 'replay'"),
        ("si.xi", "unknown part of ewc.replay in option 'si.xi'"),
        ("replay.gamma", "unknown option of replay 'gamma'"),
        ("replay.budgt", "unknown option of replay 'budgt'; did you mean 'budget'"),
        ("bugdet", r"unknown option of ewc\+replay 'bugdet'; did you mean 'budget'"),
    ],
)
def test_an_option_of_no_part(option, message):
    with pytest.raises(ValueError, match=message):
        make_method("ewc+replay", model(), **{option: 1.0})


@pytest.mark.parametrize("pair", [*itertools.product(PROTECTORS, LEARNERS)], ids="+".join)
def test_every_pair_of_both_kinds(pair):
    assert make_method("+".join(pair), model()).name == "+".join(pair)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ewc+si", "and one with a loss of its own .such as replay., got ewc and si"),
        ("replay+lwf", "got replay and lwf"),
        ("baseline+lwf", "got baseline and lwf"),
        ("ewc+replai", "unknown method 'replai'.*'replay'"),
        ("ewc+", "method: a name is missing in 'ewc.'; expected one,"),
        ("der++", r"a name is missing in 'der\+\+'; .* \(or 'derpp', for DER\+\+\)"),
        ("ewc, replay", "unknown method 'ewc, replay'; to combine the two write 'ewc.replay', "),
        (["ewc", "replay", "lwf"], "expected one name or two to combine, got 3"),
        ([], "expected one name or two to combine, got 0"),
        ([3], "unknown method 3"),
        (clext.EWC, "^method: expected a name .*, or an instance, got the class EWC$"),
        (3, "^method: expected a name .*, or an instance, got int$"),
    ],
)
def test_names_that_do_not_combine(given, message):
    with pytest.raises(ValueError, match=message):
        make_method(given, model())


# ------------------------------------------------------------------ by instance


def test_what_does_not_combine():
    one = model()
    for given in ("replay", clext.Replay, None, clext.EWC(one).combine(clext.Replay(one))):
        with pytest.raises(ValueError, match="^Combined: expected two methods of one model, got "):
            clext.EWC(one).combine(given)
    with pytest.raises(ValueError, match="replay was made for another model than ewc"):
        clext.EWC(one).combine(clext.Replay(model()))
    replay = clext.Replay(one)
    replay.consolidate(batches(0))
    with pytest.raises(ValueError, match="combine ewc and replay before their first task"):
        clext.EWC(one).combine(replay)


def test_both_parts_are_shown():
    one = model()
    method = clext.EWC(one, gamma=0.5).combine(clext.Replay(one, budget=7))
    assert re.fullmatch(r"EWC\(.*gamma=0.5.*\) \+ Replay\(.*budget=7.*\)", repr(method))


def test_the_loop_sees_the_loss_of_one_and_the_penalty_of_the_other():
    """Against the two apart on a copy, their gradients added by hand."""
    together, apart = model(), model()
    method = clext.Combined(clext.EWC(together, strength=5.0), clext.Replay(together, seed=3))
    ewc, replay = clext.EWC(apart, strength=5.0), clext.Replay(apart, seed=3)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (together, apart)]
    for task in range(3):
        method.begin_task()
        replay.begin_task()
        for x, y in batches(task):
            method.loss(x, y).backward()
            method.add_penalty_grad_()
            (replay.loss(x, y) + ewc.penalty()).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            method.update()
        data = batches(task)
        method.consolidate(iter(data))  # read once, it serves both
        ewc.consolidate(data)
        replay.consolidate(data)
    for ours, theirs in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [part.tasks for part in method.parts] == [3, 3]


@pytest.mark.parametrize("kind", [clext.GEM, clext.AGEM])
def test_the_gradient_of_the_loss_is_projected(kind):
    one, other = model(), model()
    pair = kind(one).combine(clext.LwF(one, strength=0.0))
    alone = kind(other)
    for method in (pair, alone):
        optimizer = torch.optim.SGD(method.model.parameters(), lr=0.3)
        for task in range(3):
            for x, y in batches(task):
                method.loss(x, y).backward()
                method.add_penalty_grad_()
                optimizer.step()
                optimizer.zero_grad()
            method.consolidate(batches(task))
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_both_follow_a_change_of_the_model():
    one = model()
    method = clext.EWC(one).combine(clext.ICaRL(one))
    one[0], one[2] = nn.Linear(4, 8).double(), nn.Linear(8, 3).double()
    inputs, labels = batches(0)[0]
    targets = method.begin_task((inputs.double(), labels))[2]
    assert targets.dtype == torch.float64
    assert {entry.dtype for entry in method.protector.importance.values()} == {torch.float64}


def test_an_end_that_one_refuses_changes_neither():
    one = model()
    method = clext.SI(one).combine(clext.Replay(one))
    x, y = batches(0)[0]
    for data, path in (([(x, y + 9)], 0.0), (batches(0), torch.nan)):
        method.loss(x, y).backward()
        method.add_penalty_grad_()
        method.protector._state.lists["path"][0].fill_(path)
        before = copy.deepcopy(method.state_dict())
        with pytest.raises(ValueError, match="NaN|labels reach"):
            method.consolidate(data)
        assert [part.tasks for part in method.parts] == [0, 0]
        after = method.state_dict()
        assert_same_state(after["rehearsal"], before["rehearsal"])
        assert after["counters"] == before["counters"]


# ------------------------------------------------------------------ runs


def test_a_run_of_the_pair_has_both_and_is_the_same_again():
    options = {**QUICK, "epochs": 1, "replay.strength": 3}
    models = [small(), small()]
    runs = [clext.train("ewc+replay", model=given, seed=4, **options) for given in models]
    assert runs[0].curve == runs[1].curve
    assert same(*map(weights, models))
    assert runs[0].label == "ewc+replay"
    assert runs[0].config["strength"] == 250
    assert runs[0].config["method_options"]["replay"]["strength"] == 3
    assert runs[0].config["method_options"]["ewc"]["gamma"] == 1.0
    assert "250, 3" in str(clext.Comparison({"ewc+replay": runs[0]}))


@pytest.mark.parametrize("name", LEARNERS)
def test_each_learner_trains_with_rwalk(name):
    given = small()
    before = weights(given)
    result = clext.train(f"rwalk+{name}", model=given, **{**QUICK, "epochs": 1})
    assert result.complete
    assert not same(before, weights(given))
