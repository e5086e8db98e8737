"""What methods keep of earlier tasks: resumed, copied, sent, moved; and data that they refuse."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from incremental_tasks import (
    FEATURES,
    assert_alike,
    batches_for,
    begin,
    every_setting,
    examples_for,
    go_on,
    make_model,
    ranges,
    run_task,
    run_tasks,
    train,
)
from toy_training import assert_same_state

from clext import METHODS
from clext.methods import make_method

OPTIONS = {
    "lwf": {},
    "replay": {"budget": 7, "policy": "balanced"},
    "der": {"budget": 7},
    "derpp": {"budget": 7, "batch": 3},
    "er-ace": {"budget": 7},
    "icarl": {"budget": 7},
    "dgr": {"hidden": (8, 6), "latent": 3},
    "gem": {"per_task": 5},
    "agem": {"per_task": 5, "batch": 4},
    "joint": {},
    "ewc+replay": {"budget": 7},
    "gem+lwf": {"per_task": 5},
    "si+icarl": {"budget": 7},
    "ewc+derpp": {"budget": 7},
    "agem+dgr": {"per_task": 5, "hidden": (8, 6), "latent": 3},
}
every_method = pytest.mark.parametrize("name", OPTIONS)
KEEPERS = ["replay", "icarl", "gem", "agem", "si+icarl"]  # of examples at the end of a task


def make(name, setting="class", **options):
    kind = {} if name in ("lwf", "joint", "gem+lwf") else options
    return make_method(name, make_model(setting), **{**OPTIONS[name], **kind})


# ------------------------------------------------------------------ resumed, copied, sent, moved


@every_setting
@every_method
def test_training_goes_on_after_a_resume_in_mid_task_to_the_same_bits(name, setting):
    method, resumed = make(name, setting), make(name, setting)
    run_task(method, setting, 0)
    if name != "gem+lwf":
        resumed.load_state_dict(method.state_dict())  # and then once more
    examples = begin(method, setting, 1)
    train(method, examples)

    buffer = io.BytesIO()
    torch.save([method.model.state_dict(), method.state_dict()], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    for each in (method, resumed):
        train(each, examples)
        each.consolidate(batches_for(each, setting, 1))
        run_task(each, setting, 2)
    assert_alike(method, resumed)
    inputs = torch.rand(4, FEATURES, dtype=torch.float64)
    assert torch.equal(method.predict(inputs), resumed.predict(inputs))


@every_method
def test_a_state_is_a_copy(name):
    method = make(name)
    run_task(method, "class", 0)
    state = method.state_dict()
    kept = copy.deepcopy(state)
    run_task(method, "class", 1)
    assert_same_state(state, kept)
    method.load_state_dict(state)
    run_task(method, "class", 1)
    assert_same_state(state, kept)


@every_method
@pytest.mark.parametrize("how", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
def test_a_copy_with_its_model_goes_on_alike(name, how):
    method = make(name)
    run_task(method, "class", 0)
    train(method, begin(method, "class", 1))
    twin = how(method)
    for each in (method, twin):
        each.consolidate(batches_for(each, "class", 1))
        run_task(each, "class", 2)
    assert_alike(method, twin)


@pytest.mark.slow
def test_methods_go_to_a_spawned_process_and_go_on_there():
    """All in one, as a process takes seconds to start: alone and with their models."""
    names = [*METHODS, *(name for name in OPTIONS if "+" in name)]
    methods = [make_method(name, make_model(), **OPTIONS.get(name, {})) for name in names]
    for method in methods:
        run_task(method, "class", 0)
        inputs, labels = examples_for(method, "class", 1)
        part = torch.cat([inputs, inputs])[: len(inputs)], labels  # as joint and iCaRL keep it
        method.begin_task(part, block=range(2, 4), active=range(4))
    twins = copy.deepcopy(methods)  # what is sent shares its memory with what comes
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    models = [method.model if place % 2 else None for place, method in enumerate(methods)]
    process = context.Process(target=go_on, args=(methods, models, queue))
    process.start()
    states = torch.load(io.BytesIO(queue.get(timeout=120)), weights_only=True)
    process.join()
    for method, (model_state, state) in zip(twins, states, strict=True):
        run_task(method, "class", 1)
        assert_same_state(method.model.state_dict(), model_state)
        assert_same_state(method.state_dict(), state)


@every_method
def test_what_is_kept_moves_with_the_model(name, device):
    method, twin = make(name), make(name)
    run_task(method, "class", 0)
    run_task(twin, "class", 0)
    method.model.to(device)
    for each in (method, twin):
        losses = run_task(each, "class", 1)
        scores = each.predict(torch.ones(2, FEATURES).to(losses))
    assert losses.device.type == "cpu"
    torch.testing.assert_close(
        method.predict(torch.ones(2, FEATURES).to(device).double()).cpu(), scores
    )
    twin.model.to(device)
    twin.load_state_dict(method.state_dict())
    run_task(twin, "class", 2)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("lwf", "teacher"),
        ("replay", "memory"),
        ("der", "memory"),
        ("derpp", "memory"),
        ("er-ace", "memory"),
        ("icarl", "exemplars"),
        ("dgr", "generator"),
        ("gem", "inputs"),
        ("joint", "examples"),
    ],
)
@pytest.mark.parametrize("combined", [False, True])
def test_a_state_that_does_not_fit_changes_nothing(name, key, combined):
    label = f"si+{name}" if combined and name != "gem" else name
    method, source = (make_method(label, make_model(), **OPTIONS[name]) for _ in range(2))
    run_task(method, "class", 0)
    run_tasks(source, "class", tasks=2)
    state = source.state_dict()
    (state["rehearsal"] if "+" in label else state)["extra"][key] = 3
    before = method.state_dict()
    with pytest.raises(
        ValueError, match=f"^{label.replace('+', '.')}: the state does not fit: "
    ) as e:
        method.load_state_dict(state)
    assert "\n" not in str(e.value)
    assert_same_state(method.state_dict(), before)
    run_task(method, "class", 1)


def test_states_of_one_alone_and_of_a_pair_are_not_mixed_up():
    pair, alone = make("ewc+replay"), make("replay")
    for method, other in ((pair, alone), (alone, pair)):
        with pytest.raises(ValueError, match="the state does not fit"):
            method.load_state_dict(other.state_dict())


X = torch.rand(4, FEATURES, dtype=torch.float64)
Y = torch.zeros(4).long()


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs the data of the task"),
        ([], "the data of the task is empty"),
        ([(X, Y + 2)], "labels reach from 2 to 2, expected 0 to 1"),
        ([(X, Y.double())], "labels y are torch.float64"),
        ([(X[:, :3], Y)], r"inputs are torch.float64 \[3\] each, .* \[5\]"),
        ([(X.float(), Y)], r"inputs are torch.float32 \[5\] each, expected torch.float64"),
        ([(X, Y), (X / 0, Y)], "inputs hold NaN or infinity; leave"),
    ],
)
def test_a_task_that_ends_with_bad_data_changes_nothing(name, data, message):
    method = make(name, "task")
    run_task(method, "task", 0)
    train(method, begin(method, "task", 1))
    before = method.state_dict()
    with pytest.raises(ValueError, match=message):
        method.consolidate(data)
    assert_same_state(method.state_dict(), before)


@every_method
def test_a_task_that_begins_with_labels_out_of_range_changes_nothing(name):
    method = make(name, "task")
    run_task(method, "task", 0)
    before = method.state_dict()
    block, active = ranges("task", 1)
    with pytest.raises(ValueError, match="labels reach from 2 to 2, expected 0 to 1"):
        method.begin_task((X, Y + 2), block=block, active=active)
    assert_same_state(method.state_dict(), before)


@pytest.mark.parametrize("name", [*KEEPERS, "ewc+replay"])
@pytest.mark.parametrize("once", [False, True])
def test_a_loader_may_use_its_tensors_again(name, once):
    methods = [make(name) for _ in range(2)]
    batches = batches_for(methods[0], "class", 0)

    def reusing():
        x, y = (torch.empty_like(entry) for entry in batches[0])
        for inputs, labels in batches:
            yield x.copy_(inputs), y.copy_(labels)
        x.fill_(9)
        y.fill_(0)

    class Loader:
        def __iter__(self):
            return reusing()

    for method, data in zip(methods, (batches, reusing() if once else Loader()), strict=True):
        train(method, begin(method, "class", 0))
        method.consolidate(data)
    assert_alike(*methods)


@pytest.mark.parametrize("name", KEEPERS)
def test_inputs_with_gradients_are_kept_without(name):
    method = make(name)
    train(method, begin(method, "class", 0))
    method.consolidate([(x.requires_grad_(), y) for x, y in batches_for(method, "class", 0)])
    train(method, begin(method, "class", 1))  # a second backward pass through one graph would fail
