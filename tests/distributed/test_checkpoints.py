"""torch.distributed.checkpoint of model, optimizer and method: resumed to the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.distributed.checkpoint as dcp
from processes import Processes
from sharded_models import WAYS, make_loader, make_network, make_steps, plain_parameters
from sharded_training import LOOPS, METHODS, state_of
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F
from toy_training import assert_same_state

MIDDLE = 2  # steps of the second task before the checkpoint: in the middle of RWalk's interval
CASES = [
    ("si", "fused adam"),
    ("si", "attached"),
    ("rwalk", "fused adam"),
    ("rwalk released", "attached"),
    ("ewc all", "by hand"),
]


def begun(name, method_name, loop):
    way = WAYS[name]
    model = way.wrap(make_network())
    kind, options = METHODS[method_name]
    method = kind(model, **options)
    return way, model, method, *LOOPS[loop](model, method)


def go(model, optimizer, step, batches):
    for x, y in batches:
        F.cross_entropy(model(x), y).backward()
        step()
        optimizer.zero_grad()


def facts(model, method):
    counters = {name: getattr(method, name) for name in method.counter_names}
    return {"parameters": plain_parameters(model), "counters": counters, **state_of(method)}


def saved(name, method_name, loop, folder):
    """What is there at the checkpoint, and what the training comes to."""
    way, model, method, optimizer, step = begun(name, method_name, loop)
    go(model, optimizer, step, make_steps(0, way))
    method.consolidate(make_loader(0, way))
    batches = make_steps(1, way)
    go(model, optimizer, step, batches[:MIDDLE])
    before = facts(model, method)
    models, optimizers = get_state_dict(model, optimizer)
    entries = {"model": models, "optimizer": optimizers, "method": method}
    dcp.save(entries, checkpoint_id=folder)
    assert_same_state(facts(model, method), before)
    go(model, optimizer, step, batches[MIDDLE:])
    method.consolidate(make_loader(1, way))
    return before, facts(model, method)


def loaded(name, method_name, loop, folder):
    """What is there after loading into a model with other values, and what it comes to."""
    way, model, method, optimizer, step = begun(name, method_name, loop)
    with torch.no_grad():
        for entry in model.parameters():
            entry.mul_(0.5)
    models, optimizers = get_state_dict(model, optimizer)
    entries = {"model": models, "optimizer": optimizers, "method": method}
    dcp.load(entries, checkpoint_id=folder, no_dist=way.ranks == 1)
    set_state_dict(model, optimizer, model_state_dict=models, optim_state_dict=optimizers)
    at_once = facts(model, method)
    go(model, optimizer, step, make_steps(1, way)[MIDDLE:])
    if way.ranks > 1:
        method.consolidate(make_loader(1, way))
    return at_once, facts(model, method)


@pytest.fixture
def two_processes():
    made = Processes(2)
    yield made
    made.close()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_processes_killed_in_mid_task_go_on_to_the_same_bits(
    processes, two_processes, tmp_path, name
):
    folders = {case: tmp_path / str(number) for number, case in enumerate(CASES)}
    expected = {
        case: two_processes.run(saved, name, *case, folder) for case, folder in folders.items()
    }
    two_processes.close()
    for case, folder in folders.items():
        found = processes(2).run(loaded, name, *case, folder)
        for rank in range(2):
            for mine, theirs in zip(found[rank], expected[case][rank], strict=True):
                assert_same_state(mine, theirs)


@pytest.mark.parametrize(("method", "loop"), CASES)
def test_another_number_of_processes_has_the_same_state(processes, tmp_path, method, loop):
    (expected, _), _ = processes(2).run(saved, "fsdp", method, loop, tmp_path)
    for found, _ in processes(3).run(loaded, "fsdp uneven", method, loop, tmp_path):
        assert_same_state(found, expected)
    found, _ = loaded("single", method, loop, tmp_path)
    assert_same_state(found, expected)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
def test_what_was_attached_loads_into_what_is_not(processes, tmp_path, name):
    for found, expected in processes(2).run(saved_and_loaded_alone, name, tmp_path):
        assert_same_state(found, expected)


def saved_and_loaded_alone(name, folder):
    """Model and method as they are, without an optimizer."""
    way, model, method, optimizer, step = begun(name, "si", "attached")
    go(model, optimizer, step, make_steps(0, way))
    method.consolidate(make_loader(0, way))
    go(model, optimizer, step, make_steps(1, way))
    dcp.save({"model": model, "method": method}, checkpoint_id=folder)
    _, other, loaded, _, _ = begun(name, "si", "by hand")
    dcp.load({"model": other, "method": loaded}, checkpoint_id=folder)
    return facts(other, loaded), facts(model, method)
