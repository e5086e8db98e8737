"""DER, DER++ and ER-ACE against loops over examples, each part with a pass of its own."""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toy_training import assert_same_state

import clext

FEATURES, CLASSES, BATCH = 5, 4, 6
KINDS = {"der": clext.DER, "derpp": clext.DERpp}


def make_model(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, CLASSES)
    return nn.Sequential(*layers).double()


def make_batches(task, count=4, classes=range(CLASSES)):
    random = torch.Generator().manual_seed(20 + task)
    for _ in range(count):
        x = torch.randn(BATCH, FEATURES, generator=random, dtype=torch.float64)
        yield x, torch.randint(len(classes), (BATCH,), generator=random)


def with_draws(method):
    """The method, and a list of what it draws in each loss."""
    drawn, sample = [], method._buffer.sample

    def watched(*args):
        drawn.append(sample(*args))
        return drawn[-1]

    method._buffer.sample = watched
    return method, drawn


def step(method, optimizer, x, y):
    optimizer.zero_grad()
    loss = method.loss(x, y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def without_draws(method):
    """Its state, but for the generator: what was drawn for a loss that is refused is drawn."""
    state = method.state_dict()
    del state["extra"]["memory"]["random"]
    return state


def key(row):
    return tuple(row.tolist())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (clext.DER, {"strength": 0.7}),
        (clext.DER, {"strength": 0.7, "beta": 0.3, "batch": 3}),
        (clext.DERpp, {"strength": 0.2}),
        (clext.DERpp, {"strength": 0.0, "beta": 1.5, "batch": 9}),
    ],
    ids=str,
)
def test_the_loss_is_that_of_three_passes(kind, options):
    model = make_model()
    method, drawn = with_draws(kind(model, budget=10, **options))
    beta = options.get("beta", 0.5 if kind is clext.DERpp else 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    seen = {}  # what was given so far: label, and the logits from before its step
    for task in range(3):
        for x, y in make_batches(task):
            drawn.clear()
            before = copy.deepcopy(model)
            loss = step(method, optimizer, x, y)
            expected = F.cross_entropy(before(x), y)
            if seen:
                assert len(drawn) == (2 if beta else 1)
                count = options.get("batch") or BATCH
                assert all(len(labels) == count for _, labels in drawn)
                old, _ = drawn[0]
                stored = torch.stack([seen[key(row)][1] for row in old["inputs"]])
                difference = before(old["inputs"]) - stored
                expected = expected + options["strength"] * difference.square().mean()
                if beta:
                    more, labels = drawn[1]
                    assert labels.tolist() == [seen[key(row)][0] for row in more["inputs"]]
                    expected = expected + beta * F.cross_entropy(before(more["inputs"]), labels)
            else:
                assert drawn == [], "nothing is replayed before something is in the memory"
            torch.testing.assert_close(loss, expected.detach())
            gradients = torch.autograd.grad(expected, list(before.parameters()))
            for entry, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(entry.grad, gradient)
            old = before(x).detach()
            seen.update({key(a): (int(b), z) for a, b, z in zip(x, y, old, strict=True)})
        method.consolidate()
        assert len(method._buffer) == 10
        tree, labels, _ = method._buffer.rows
        for row, logits, label in zip(tree["inputs"], tree["logits"], labels, strict=True):
            assert int(label) == seen[key(row)][0]
            torch.testing.assert_close(logits, seen[key(row)][1])


@pytest.mark.parametrize("name", KINDS)
def test_a_batch_is_in_the_memory_after_its_step_and_a_look_at_the_loss_is_not(name):
    method = KINDS[name](make_model(), budget=100)
    (x, y), (x2, y2), *_ = make_batches(0)
    method.loss(x, y).backward()
    assert len(method._buffer) == 0
    method.loss(x2, y2).backward()
    assert len(method._buffer) == BATCH
    with torch.no_grad():
        method.loss(x, y)  # takes the second in, and is none itself
    assert len(method._buffer) == 2 * BATCH
    with torch.no_grad():
        method.loss(x, y)
    assert len(method._buffer) == 2 * BATCH
    method.consolidate()
    assert sorted(map(key, method._buffer.rows[0]["inputs"])) == sorted(
        map(key, torch.cat([x, x2]))
    )


@pytest.mark.parametrize("growing", [True, False], ids=["one head that grows", "a head a task"])
def test_old_labels_compete_as_their_task_did(growing):
    """The second draw's classes: with all that are active, or with those of their own task."""
    model = make_model()
    method, drawn = with_draws(clext.DERpp(model, strength=0.0, beta=1.0, budget=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for task in range(2):
        block = range(2 * task, 2 * task + 2)
        active = range(block.stop) if growing else block
        method.begin_task(block=block, active=active)
        for x, y in make_batches(task, classes=block):
            drawn.clear()
            local = y + 2 * task if growing else y
            before = copy.deepcopy(model)
            loss = step(method, optimizer, x, local)
            if not drawn:
                continue
            expected = F.cross_entropy(before(x)[:, active.start : active.stop], local)
            tree, labels = drawn[1]
            terms = []
            for row, label in zip(tree["inputs"], labels.tolist(), strict=True):
                own = range(2 * (label // 2), 2 * (label // 2) + 2)
                rivals = active if growing else own
                logits = before(row)[rivals.start : rivals.stop]
                terms.append(F.cross_entropy(logits, torch.tensor(label - rivals.start)))
            torch.testing.assert_close(loss, (expected + torch.stack(terms).mean()).detach())
        method.consolidate()
    assert set(method._buffer.rows[1].tolist()) == set(range(4))


def test_the_distance_is_over_all_outputs_those_of_other_tasks_too():
    model = make_model()
    method, drawn = with_draws(clext.DER(model, strength=1.0))
    method.begin_task(block=range(2), active=range(2))
    (x, y), (x2, y2), *_ = make_batches(0, classes=range(2))
    method.loss(x, y)
    before = model(x).detach()
    with torch.no_grad():
        model[2].bias[3] += 2.0  # an output that no task has yet
    loss = method.loss(x2, y2)
    moved = F.cross_entropy(model(x2)[:, :2], y2) + 2.0**2 / CLASSES
    torch.testing.assert_close(drawn[0][0]["logits"].sort(0).values, before.sort(0).values)
    torch.testing.assert_close(loss, moved)


@pytest.mark.parametrize("name", KINDS)
def test_outputs_that_grow_are_refused_and_nothing_is_changed(name):
    model = make_model()
    method = KINDS[name](model)
    for x, y in make_batches(0):
        method.loss(x, y).backward()
    method.consolidate()
    before = without_draws(method)
    model[2] = nn.Linear(7, CLASSES + 1).double()
    with pytest.raises(ValueError, match=r"has 5 outputs, .* are of 4; make it with the outputs"):
        method.loss(*next(make_batches(1)))
    assert_same_state(without_draws(method), before)


@pytest.mark.parametrize("name", KINDS)
def test_a_state_from_the_middle_of_a_task_goes_on_to_the_same_bits(name):
    ends = []
    for saves in (False, True):
        model = make_model()
        method = KINDS[name](model, budget=8, seed=3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for task in range(2):
            for number, (x, y) in enumerate(make_batches(task)):
                step(method, optimizer, x, y)
                if saves and task == 1 and number == 1:
                    state = copy.deepcopy(method.state_dict())
                    method = KINDS[name](model, budget=8, seed=3)
                    method.load_state_dict(state)
            method.consolidate()
        ends.append((method.state_dict(), [entry.detach() for entry in model.parameters()]))
    assert_same_state(ends[1][0], ends[0][0])
    assert all(map(torch.equal, ends[0][1], ends[1][1]))


BAD_OPTIONS = [
    ({"budget": 0}, "budget must be an integer >= 1"),
    ({"beta": -0.1}, "beta must be"),
    ({"strength": -1.0}, "strength must be"),
    ({"batch": 0}, "batch must be"),
    ({"likelihood": "gaussian"}, "needs classes"),
]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (name, *bad)
        for name in [*KINDS, "er-ace"]
        for bad in BAD_OPTIONS
        if name != "er-ace" or "beta" not in bad[0]  # which it has not
    ],
    ids=str,
)
def test_options_that_there_are_not(name, options, message):
    with pytest.raises(ValueError, match=message):
        clext.METHODS[name](make_model(), **options)


@pytest.mark.parametrize("name", KINDS)
def test_inputs_of_another_kind_are_refused_and_nothing_is_changed(name):
    method = KINDS[name](make_model())
    for x, y in make_batches(0):
        method.loss(x, y)
    method.consolidate()
    before = method.state_dict()
    with pytest.raises(ValueError, match="in the memory"):
        method.loss(torch.randn(3, FEATURES + 1).double(), torch.zeros(3, dtype=torch.int64))
    assert_same_state(method.state_dict(), before)


STREAMS = {
    **KINDS,
    "er-ace": clext.ERACE,
    "replay": functools.partial(clext.Replay, policy="stream"),
}
every_stream = pytest.mark.parametrize("name", STREAMS)


def inputs_of(method):
    return method._kept()[0]


@every_stream
def test_a_loader_may_use_its_tensors_again(name):
    method = STREAMS[name](make_model())
    x, y = torch.empty(BATCH, FEATURES).double(), torch.empty(BATCH, dtype=torch.int64)
    for number in range(3):
        x.fill_(number)
        y.fill_(number)
        method.loss(x, y)
    method.consolidate()
    assert inputs_of(method)[:, 0].tolist() == method._kept()[1].tolist()


@every_stream
def test_what_is_not_finite_or_not_labelled_is_not_kept(name):
    method = STREAMS[name](make_model())
    x, y = next(make_batches(0))
    x[1, 2], y[3] = torch.nan, -100
    method.loss(x, y)
    method.loss(*next(make_batches(1)))
    assert len(method._buffer) == BATCH - 2
    assert bool(inputs_of(method).isfinite().all())
    assert bool((method._kept()[1] >= 0).all())
    with torch.no_grad():
        x.fill_(torch.nan)
    method.loss(x, y)
    method.consolidate()
    assert len(method._buffer) == 2 * BATCH - 2


@every_stream
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integers_are_kept_as_one_kind(name, dtype):
    method = STREAMS[name](make_model(), budget=9)
    for task in range(2):
        method.begin_task(block=range(2 * task, 2 * task + 2), active=range(2 * task, 2 * task + 2))
        for number, (x, y) in enumerate(make_batches(task, classes=range(2))):
            loss = method.loss(x, y.to(dtype) if number % 2 else y)
            assert bool(loss.isfinite())
        method.consolidate()
    assert method._kept()[1].dtype == torch.int64


@every_stream
def test_inputs_of_another_type_are_refused_before_they_are_learned(name):
    method = STREAMS[name](make_model())
    x, y = next(make_batches(0))
    method.loss(x, y)
    with pytest.raises(ValueError, match="in the memory"):
        method.loss(x.float(), y)


@every_stream
def test_a_first_task_with_another_loss_is_not_kept_and_that_is_said(name):
    method = STREAMS[name](make_model())
    x, y = next(make_batches(0))
    F.cross_entropy(method.model(x), y).backward()
    with pytest.warns(UserWarning, match="saw no step of this task"):
        method.consolidate([(x, y)])
    assert len(method._buffer) == 0


@every_stream
def test_a_state_dict_takes_what_it_keeps(name):
    """A named tuple would be none that torch.load takes back."""
    point = collections.namedtuple("point", "x")
    method = STREAMS[name](make_model(), forward=lambda model, batch: model(batch[0].x))
    x, y = next(make_batches(0))
    with pytest.raises(ValueError, match="which can be kept in a state dict"):
        method.loss((point(x), y))


@pytest.mark.parametrize("name", [*KINDS, "er-ace"])
def test_a_function_that_gives_losses_alone_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name} learns from the outputs .* give forward="):
        STREAMS[name](make_model(), loss=lambda model, batch: model(batch[0]).sum(1))


# ---------------------------------------------------------------------- ER-ACE


def one_loss(logits, label, classes):
    """Cross entropy of one example among these classes."""
    return logits[sorted(classes)].logsumexp(0) - logits[label]


@pytest.mark.parametrize("options", [{}, {"strength": 0.4, "batch": 9}], ids=str)
@pytest.mark.parametrize("outputs", ["all", "those seen"])
def test_absent_classes_have_no_part_in_the_loss_of_the_batch(options, outputs):
    model = make_model()
    method, drawn = with_draws(clext.ERACE(model, budget=8, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given = [[], []]
    for task in range(2):
        block = range(2 * task, 2 * task + 2)
        active = range(CLASSES) if outputs == "all" else range(block.stop)
        method.begin_task(block=block, active=active)
        for x, labels in make_batches(task, classes=block):
            y = labels + 2 * task
            if len(given[task]) == 2:
                y = torch.full_like(y, 2 * task)  # a batch that lacks a class of its own task
            given[task].append(y)
            drawn.clear()
            before = copy.deepcopy(model)
            loss = step(method, optimizer, x, y)
            present = set(y.tolist()) if task > 0 else set(active)
            pairs = zip(before(x), y, strict=True)
            expected = torch.stack([one_loss(z, int(c), present) for z, c in pairs]).mean()
            assert bool(drawn) == (task > 0 or len(given[0]) > 1)
            for old, old_labels in drawn:
                assert len(old_labels) == options.get("batch", len(y))
                pairs = zip(before(old), old_labels, strict=True)
                terms = [one_loss(z, int(c), set(active)) for z, c in pairs]
                expected = expected + options.get("strength", 1.0) * torch.stack(terms).mean()
            torch.testing.assert_close(loss, expected.detach())
            gradients = torch.autograd.grad(expected, list(before.parameters()))
            for entry, gradient in zip(model.parameters(), gradients, strict=True):
                torch.testing.assert_close(entry.grad, gradient)
        method.consolidate()
    kept = set(method._buffer.rows[1].tolist())
    assert kept & {0, 1}
    assert kept & {2, 3}


def test_labels_that_do_not_count_mark_no_class():
    method = clext.ERACE(make_model())
    x, y = next(make_batches(0))
    method.loss(x, y)
    method.consolidate()
    y = torch.tensor([0, 0, -100, 0, 1, -100])
    loss = method.loss(x, y).detach()
    logits = method.model(x)[[0, 1, 3, 4]][:, :2].detach()
    assert loss > F.cross_entropy(logits, y[[0, 1, 3, 4]])
