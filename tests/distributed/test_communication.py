"""A method adds no communication to a step; the end of a task has its own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from collectives import CONTESTANTS, Collectives, counted
from sharded_models import FEATURES, WAYS
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

SIZE = (FEATURES, 10)
NAMES = ["ddp", "fsdp", "tp"]


def some_collectives():
    with Collectives() as found:
        dist.all_reduce(torch.zeros(10))
        mesh = init_device_mesh("cpu", (2,))
        DTensor.from_local(torch.ones(4), mesh, [Partial()]).full_tensor()
    return dict(found.calls), found.bytes


def test_collectives_are_counted(processes):
    assert processes(2).run(some_collectives) == [({"allreduce_": 1, "all_reduce": 1}, 56)] * 2


# torch clips no mixture of sharded and plain parameters, as "tp" has.
CASES = [
    (name, contestant)
    for name in NAMES
    for contestant, (_, base) in CONTESTANTS.items()
    if not (name == "tp" and "clipped" in base)
]


@pytest.mark.parametrize(("name", "contestant"), CASES)
def test_a_step_sends_what_it_sends_without_a_method(processes, name, contestant):
    base = CONTESTANTS[contestant][1]
    run = processes(WAYS[name].ranks).run
    for found, expected in zip(
        run(counted, name, contestant, *SIZE), run(counted, name, base, *SIZE), strict=True
    ):
        assert sum(expected["calls"].values()) > 0
        if "clipped" in base:  # both reduce a norm once, clext's of one number
            assert sum(found["calls"].values()) <= sum(expected["calls"].values())
            assert found["bytes"] <= expected["bytes"]
        else:
            assert found["calls"] == expected["calls"]
            assert found["bytes"] == expected["bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_a_task_of_a_path_sends_no_state(processes, name):
    """SI measures nothing on data: its state is known where it is."""
    width, hidden = 64, 128
    for found in processes(WAYS[name].ranks).run(counted, name, "SI", width, hidden):
        assert found["end"]["bytes"] < 0.1 * 4 * 4 * width * hidden
