"""The replay buffer: which examples stay, and how they are drawn."""

from __future__ import annotations

import copy

import pytest
import torch

from clext.methods.parts.buffer import POLICIES, ReplayBuffer

every_policy = pytest.mark.parametrize("policy", POLICIES)


def stream(sizes, start=0, labels=None):
    """Batches whose inputs are numbered; labels are given, or 0 to 3 in turn."""
    for size in sizes:
        numbers = torch.arange(start, start + size)
        given = numbers % 4 if labels is None else torch.full((size,), labels)
        yield numbers.double().view(-1, 1), given
        start += size


def filled(sizes=(7, 30, 1, 12), budget=10, policy="reservoir", seed=0, labels=None):
    buffer = ReplayBuffer(budget, policy, seed)
    buffer.add("replay", stream(sizes, labels=labels))
    return buffer


def numbers(buffer):
    return buffer.rows[0].view(-1).long().tolist()


def test_everything_is_kept_until_the_budget_is_full():
    buffer = filled([3, 4], budget=10)
    assert numbers(buffer) == list(range(7))
    buffer.add("replay", stream([3], start=7))
    assert numbers(buffer) == list(range(10))
    buffer.add("replay", stream([1], start=10))
    assert len(buffer) == 10


@every_policy
def test_labels_stay_with_their_inputs(policy):
    buffer = filled(policy=policy)
    assert buffer.rows[1].tolist() == [number % 4 for number in numbers(buffer)]
    assert len(set(numbers(buffer))) == len(buffer) == 10


@every_policy
def test_every_example_has_the_same_chance(policy):
    """Of a class; whatever batch it came in, and however often the buffer was filled since."""
    runs, counts = 600, torch.zeros(40)
    for seed in range(runs):
        buffer = ReplayBuffer(10, policy, seed)
        for start, sizes in ((0, [3, 9]), (12, [20, 2]), (34, [6])):
            buffer.add("replay", stream(sizes, start, labels=0))
        counts[numbers(buffer)] += 1
    assert counts.sum() == 10 * runs
    share = counts / runs  # each 1/4 with a standard deviation of 0.0177
    assert share.sub(0.25).abs().max() < 5 * 0.0177


def test_those_with_the_smallest_keys_stay():
    """Of all keys drawn: nobody is lost who would have to be in."""
    buffer, random, keys = ReplayBuffer(6, "reservoir", 3), torch.Generator().manual_seed(3), []
    for start in range(0, 60, 10):
        buffer.add("replay", stream([10], start))
        keys.append(torch.randint(2**62, (10,), generator=random))
    assert numbers(buffer) == sorted(torch.cat(keys).argsort()[:6].tolist())


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
    buffer = ReplayBuffer(10, "balanced", 0)
    batches = (batch for label, n in counts.items() for batch in stream([n], labels=label))
    buffer.add("replay", batches)
    assert {label: buffer.rows[1].tolist().count(label) for label in counts} == shares


def test_old_classes_shrink_by_chance_when_new_ones_come():
    buffer = filled([30], policy="balanced", labels=0)
    before = set(numbers(buffer))
    buffer.add("replay", stream([30], 100, labels=1))
    old = {number for number in numbers(buffer) if number < 100}
    assert len(old) == 5
    assert old < before
    assert old != set(sorted(before)[:5])


def test_a_sample_is_without_replacement_where_it_can_be(device):
    buffer = ReplayBuffer(10, "reservoir", 0)
    buffer.add("replay", ((x.to(device), y.to(device)) for x, y in stream([50])))
    assert numbers(buffer) == numbers(filled([50]))  # the same on every device
    kept = set(numbers(buffer))
    inputs, labels = buffer.sample(10)
    assert inputs.device.type == labels.device.type == device
    assert set(inputs.view(-1).long().tolist()) == kept
    assert labels.tolist() == [number % 4 for number in inputs.view(-1).long().tolist()]
    drawn = [buffer.sample(4)[0].view(-1).long().tolist() for _ in range(300)]
    assert all(len(set(entry)) == 4 for entry in drawn)
    assert {number for entry in drawn for number in entry} == kept
    more = buffer.sample(25)[0].view(-1).long().tolist()
    assert len(more) == 25
    assert set(more) <= kept


@every_policy
def test_the_seed_decides_and_a_restored_buffer_goes_on_alike(policy):
    buffer, twin, other = (filled(policy=policy, seed=seed) for seed in (1, 9, 2))
    assert numbers(buffer) != numbers(other)
    buffer.sample(3)
    twin.load_state_dict(copy.deepcopy(buffer.state_dict()), torch.device("cpu"))
    for each in (buffer, twin):
        each.sample(2)
        each.add("replay", stream([40], 50))
    assert numbers(twin) == numbers(buffer)
    assert twin.sample(4)[0].equal(buffer.sample(4)[0])


def test_a_state_of_the_former_version_is_taken():
    """The state of its generator went with the device, and all of it was empty at first."""
    buffer, twin = filled(), filled(seed=5)
    state = buffer.state_dict()
    random = {"device": "cpu", "state": state["random"]}
    twin.load_state_dict({**state, "random": random}, torch.device("cpu"))
    assert twin.sample(5)[0].equal(buffer.sample(5)[0])
    twin.load_state_dict({}, torch.device("cpu"))
    assert len(twin) == 0
    twin.add("replay", stream([20]))
    assert numbers(twin) == numbers(filled([20], seed=5))


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
    buffer, untouched = filled(), filled()
    with pytest.raises(ValueError, match=message):
        buffer.add("replay", batches())
    for each in (buffer, untouched):
        each.add("replay", stream([20], 60))
    assert numbers(buffer) == numbers(untouched)
    assert buffer.sample(5)[0].equal(untouched.sample(5)[0])


# ---------------------------------------------------------------------- a stream


@pytest.mark.parametrize("budget", [1, 10, 23, 200])
def test_a_stream_is_chosen_from_as_a_task_is(budget):
    """The same keys are drawn for the same examples, so the same ones stay, in another order."""
    followed, added = (ReplayBuffer(budget, "reservoir", 5) for _ in range(2))
    for start, sizes in ((0, [7, 30, 1]), (38, [12, 60]), (110, [5] * 9)):
        for inputs, labels in stream(sizes, start):
            followed.follow(inputs, labels)
        added.add("replay", stream(sizes, start))
        assert sorted(numbers(followed)) == sorted(numbers(added))
        assert followed.rows[1].tolist() == [number % 4 for number in numbers(followed)]
        kept = dict(zip(numbers(added), added.rows[2].tolist(), strict=True))
        assert dict(zip(numbers(followed), followed.rows[2].tolist(), strict=True)) == kept


@pytest.mark.parametrize("sizes", [[40], [3] * 13 + [1], [1] * 40, [12, 20, 2, 6]], ids=str)
def test_every_example_of_a_stream_has_the_same_chance(sizes):
    """The first and the last, and those before the budget was full; by chi square as well."""
    runs, budget, total = 600, 10, 40
    counts = torch.zeros(total, dtype=torch.float64)
    for seed in range(runs):
        buffer = ReplayBuffer(budget, "reservoir", seed)
        for inputs, labels in stream(sizes):
            buffer.follow(inputs, labels)
        assert len(set(numbers(buffer))) == budget
        counts[numbers(buffer)] += 1
    share = budget / total
    deviation = (runs * share * (1 - share)) ** 0.5
    scores = (counts - runs * share) / deviation
    assert scores.abs().max() < 5
    # 39 degrees of freedom: the sum of their squares is near 40, with a deviation of 9.
    assert scores.square().sum() < 40 + 6 * 9


def test_a_stream_goes_on_alike_after_a_resume():
    buffer, twin = (ReplayBuffer(10, "reservoir", seed) for seed in (1, 9))
    for inputs, labels in stream([4, 3]):  # not full yet, and then beyond it
        buffer.follow(inputs, labels)
    twin.load_state_dict(copy.deepcopy(buffer.state_dict()), torch.device("cpu"))
    for inputs, labels in stream([2, 9, 1, 30], start=7):
        for each in (buffer, twin):
            each.sample(3)
            each.follow(inputs, labels)
        assert numbers(twin) == numbers(buffer)


def test_a_full_buffer_is_changed_in_place():
    buffer = ReplayBuffer(10, "reservoir", 0)
    for inputs, labels in stream([12, 30]):
        buffer.follow(inputs, labels)
        kept = buffer.rows[0]
    where = kept.data_ptr()
    for inputs, labels in stream([40, 3, 5], start=42):
        buffer.follow(inputs, labels)
    assert buffer.rows[0].data_ptr() == where
    assert max(numbers(buffer)) > 41


def test_what_a_stream_kept_is_its_own():
    """A loader may use the tensors of a batch again."""
    buffer = ReplayBuffer(10, "reservoir", 0)
    inputs, labels = torch.zeros(4, 1).double(), torch.zeros(4, dtype=torch.int64)
    buffer.follow(inputs, labels)
    inputs.fill_(9.0)
    labels.fill_(9)
    assert numbers(buffer) == [0, 0, 0, 0]
    assert buffer.rows[1].tolist() == [0, 0, 0, 0]


def test_a_state_of_more_examples_than_the_budget_is_cut_to_it():
    large, small = ReplayBuffer(20, "reservoir", 0), ReplayBuffer(8, "reservoir", 0)
    for inputs, labels in stream([12, 30]):
        large.follow(inputs, labels)
    small.load_state_dict(large.state_dict(), torch.device("cpu"))
    kept = sorted(large.rows[2].tolist())[:8]
    assert sorted(small.rows[2].tolist()) == kept


def test_rows_of_a_stream_are_copied_a_few_times_alone():
    """Not all of them for each batch: room is made for twice as many."""
    buffer, places = ReplayBuffer(1000, "reservoir", 0), set()
    for inputs, labels in stream([5] * 200):
        buffer.follow(inputs, labels)
        places.add(buffer.rows[0].data_ptr())
    assert len(buffer) == 1000
    assert len(places) <= 9
