"""The memory of examples: which stay, how they are drawn, and what is kept of it."""

from __future__ import annotations

import copy

import pytest
import torch

from clext.methods.parts.buffer import POLICIES, Memory


def stream(sizes, start=0, labels=None):
    """Batches whose inputs are numbered; labels are given, or 0 to 3 in turn."""
    for size in sizes:
        numbers = torch.arange(start, start + size)
        given = numbers % 4 if labels is None else torch.full((size,), labels)
        yield numbers.double().view(-1, 1), given
        start += size


def filled(sizes=(7, 30, 1, 12), budget=10, policy="reservoir", seed=0, labels=None):
    memory = Memory("replay", budget, policy, seed)
    memory.prepare(stream(sizes, labels=labels))()
    return memory


def numbers(memory):
    return memory.inputs.view(-1).long().tolist()


def test_everything_is_kept_until_the_budget_is_full():
    memory = filled([3, 4], budget=10)
    assert memory.size == 7
    assert sorted(numbers(memory)) == list(range(7))
    memory.prepare(stream([3], start=7))()
    assert sorted(numbers(memory)) == list(range(10))
    memory.prepare(stream([1], start=10))()
    assert memory.size == 10


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_labels_stay_with_their_inputs(policy):
    memory = filled(policy=policy)
    assert memory.labels.tolist() == [number % 4 for number in numbers(memory)]
    assert len(set(numbers(memory))) == memory.size == 10


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_every_example_has_the_same_chance(policy):
    """Of a class; whatever batch it came in, and however often the memory was filled since."""
    runs, counts = 1500, torch.zeros(40)
    for seed in range(runs):
        memory = Memory("replay", 10, policy, seed)
        for start, sizes in ((0, [3, 9]), (12, [20, 2]), (34, [6])):
            memory.prepare(stream(sizes, start, labels=0))()
        counts[numbers(memory)] += 1
    assert counts.sum() == 10 * runs
    share = counts / runs  # each 1/4 with a standard deviation of 0.0112
    assert share.sub(0.25).abs().max() < 5 * 0.0112


def test_those_with_the_smallest_keys_stay():
    """Of all keys drawn: nobody is lost who would have to be in."""
    memory, budget = Memory("replay", 6, "reservoir", 3), 6
    random, keys = torch.Generator().manual_seed(3), []
    for start in range(0, 60, 10):
        memory.prepare(stream([10], start))()
        keys.append(torch.randint(2**62, (10,), generator=random))
    smallest = torch.cat(keys).argsort()[:budget].tolist()
    assert sorted(numbers(memory)) == sorted(smallest)


@pytest.mark.parametrize(
    ("counts", "shares"),
    [
        ({0: 100}, {0: 10}),
        ({0: 100, 1: 100, 2: 100}, {0: 4, 1: 3, 2: 3}),
        ({5: 100, 1: 2, 3: 100}, {1: 2, 3: 4, 5: 4}),
        ({0: 1, 1: 3, 2: 4, 3: 50}, {0: 1, 1: 3, 2: 3, 3: 3}),
        ({0: 2, 1: 3}, {0: 2, 1: 3}),
        (dict.fromkeys(range(12), 9), {label: int(label < 10) for label in range(12)}),
    ],
)
def test_balanced_shares_the_budget_evenly_and_uses_all_of_it(counts, shares):
    memory = Memory("replay", 10, "balanced", 0)
    memory.prepare(batch for label, n in counts.items() for batch in stream([n], labels=label))()
    kept = {label: memory.labels.tolist().count(label) for label in counts}
    assert kept == shares


def test_old_classes_shrink_by_chance_when_new_ones_come():
    memory = filled([30], policy="balanced", labels=0)
    before = set(numbers(memory))
    memory.prepare(stream([30], 100, labels=1))()
    old = {number for number in numbers(memory) if number < 100}
    assert len(old) == 5
    assert old < before
    assert old != set(sorted(before)[:5])


def test_a_sample_is_without_replacement_where_it_can_be(device):
    memory = Memory("replay", 10, "reservoir", 0)
    memory.prepare((x.to(device), y.to(device)) for x, y in stream([50]))()
    kept = set(numbers(memory))
    inputs, labels = memory.sample(10)
    assert inputs.device.type == labels.device.type == device
    assert set(inputs.view(-1).long().tolist()) == kept
    assert labels.tolist() == [number % 4 for number in inputs.view(-1).long().tolist()]
    drawn = [memory.sample(4)[0].view(-1).long().tolist() for _ in range(300)]
    assert all(len(set(entry)) == 4 for entry in drawn)
    assert {number for entry in drawn for number in entry} == kept
    more = memory.sample(25)[0].view(-1).long().tolist()
    assert len(more) == 25
    assert set(more) <= kept


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
def test_the_seed_decides(policy):
    one, same, other = (filled(policy=policy, seed=seed) for seed in (1, 1, 2))
    assert numbers(one) == numbers(same) != numbers(other)
    assert one.sample(5)[0].equal(same.sample(5)[0])


def test_tensors_are_allocated_once():
    memory = filled([2], budget=10)
    places = memory.inputs.data_ptr(), memory.labels.data_ptr()
    for start in (2, 30):
        memory.prepare(stream([28], start))()
        assert (memory.inputs.data_ptr(), memory.labels.data_ptr()) == places


def broken():
    yield from stream([20], 60)
    raise ValueError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (broken, "the disk is gone"),
        (
            lambda: [*stream([20], 60), (torch.zeros(2, 3).double(), torch.zeros(2).long())],
            r"replay: inputs are torch.float64 \[3\] each, expected torch.float64 \[1\]",
        ),
        (lambda: [(torch.zeros(2, 1), torch.zeros(2).long())], "are torch.float32"),
    ],
)
def test_what_fails_changes_nothing(batches, message):
    memory, untouched = filled(), filled()
    with pytest.raises(ValueError, match=message):
        memory.prepare(batches())
    memory.prepare(stream([20], 60))  # not committed
    assert numbers(memory) == numbers(untouched)
    for each in (memory, untouched):
        each.prepare(stream([20], 60))()
    assert numbers(memory) == numbers(untouched)
    assert memory.sample(5)[0].equal(untouched.sample(5)[0])


@pytest.mark.parametrize("policy", ["reservoir", "balanced"])
@pytest.mark.parametrize("how", ["state", "deepcopy"])
def test_a_restored_memory_goes_on_alike(policy, how):
    memory = filled(policy=policy)
    memory.sample(3)
    twin = copy.deepcopy(memory)
    if how == "state":
        twin = Memory("replay", 10, policy, 99)
        twin.prepare_load(memory.state_dict(), torch.device("cpu"))()
    for each in (memory, twin):
        each.sample(2)
        each.prepare(stream([40], 50))()
    assert numbers(twin) == numbers(memory)
    assert twin.sample(4)[0].equal(memory.sample(4)[0])
    twin.prepare_load({}, torch.device("cpu"))()
    assert twin.size == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": None}, "is .'inputs', 'labels', 'random', 'seen'., expected inputs"),
        ({"labels": torch.zeros(10)}, r"'labels' is torch.float32 \[10\], expected int64 \[10\]"),
        ({"keys": torch.zeros(3).long()}, r"'keys' is torch.int64 \[3\]"),
        ({"inputs": "x"}, "'inputs' is str, expected a tensor"),
        ({"labels": torch.full((10,), -1)}, "labels below 0"),
        ({"seen": {0: -1}}, "'seen' is {0: -1}, expected a count"),
        ({"seen": [3]}, "expected a count"),
        ({"random": {"state": 3}}, "is no state of a generator"),
    ],
)
def test_a_state_that_is_none_is_refused(change, message):
    memory = filled()
    state = {k: v for k, v in (memory.state_dict() | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        memory.prepare_load(state, torch.device("cpu"))
    with pytest.raises(ValueError, match="has 10 examples and the budget is 9"):
        Memory("replay", 9, "reservoir", 0).prepare_load(memory.state_dict(), torch.device("cpu"))


@pytest.mark.parametrize("labels", [0, None])
@pytest.mark.parametrize(("saved", "policy"), [POLICIES, POLICIES[::-1]])
def test_a_state_of_the_other_policy_is_refused_where_they_differ(saved, policy, labels):
    memory, twin = filled(policy=saved, labels=labels), Memory("replay", 10, policy, 0)
    if labels == 0:  # one class: both policies count it alike
        twin.prepare_load(memory.state_dict(), torch.device("cpu"))()
        assert numbers(twin) == numbers(memory)
        return
    with pytest.raises(ValueError, match="'seen' is .*; make the method with the policy that it"):
        twin.prepare_load(memory.state_dict(), torch.device("cpu"))


def test_the_memory_moves(device):
    memory = filled()
    expected = numbers(memory)
    memory.move(torch.device(device))
    assert memory.inputs.device.type == device
    assert numbers(memory) == expected
    assert memory.sample(5)[0].device.type == device
    if device == "cpu":
        twin = filled()
        twin.sample(5)
        assert memory.sample(5)[0].equal(twin.sample(5)[0])
