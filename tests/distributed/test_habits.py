"""What loops do beside steps, and options of the wrappers, change nothing."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sharded_models import (
    WAYS,
    all_batches,
    make_loader,
    make_network,
    make_steps,
    plain_parameters,
)
from sharded_training import LOOPS, METHODS, assert_close, state_of
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from toy_training import assert_same_state

import clext

NAMES = ["ddp", "fsdp", "fsdp uneven", "tp"]


def begun(name, method_name="si", loop="fused adam", wrap=None):
    way = WAYS[name]
    model = (wrap or way.wrap)(make_network())
    kind, options = METHODS[method_name]
    method = kind(model, **options)
    return way, model, method, *LOOPS[loop](model, method)


@contextmanager
def unsynchronised(model):
    """Backward passes of an accumulation before its last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield


def look_at(model, x):
    """After it FSDP2's root module holds whole parameters."""
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()


def taught(name, habit, method_name="si", loop="fused adam"):
    """Two tasks; `habit`: what is done beside the steps."""
    wrap = WRAPS.get(habit)
    way, model, method, optimizer, step = begun(name, method_name, loop, wrap)
    for task in range(2):
        for x, y in make_steps(task, way):
            if habit == "evaluation":
                look_at(model, x)
            if habit == "accumulation":
                with unsynchronised(model):
                    (F.cross_entropy(model(x[::2]), y[::2]) / 2).backward()
                (F.cross_entropy(model(x[1::2]), y[1::2]) / 2).backward()
            else:
                F.cross_entropy(model(x), y).backward()
            step()
            optimizer.zero_grad(set_to_none=habit != "zeros")
        if habit == "evaluation":
            look_at(model, x)
        if habit == "state":
            method.load_state_dict(method.state_dict())
        if habit == "plain state":
            method.load_state_dict(whole(method.state_dict()))
        method.consolidate(all_batches(task, 1) if way.ranks == 1 else make_loader(task, way))
        if habit == "evaluation":
            look_at(model, x)
            state_of(method)
    found = {"parameters": plain_parameters(model), **state_of(method)}
    return {key: inner_names(values) for key, values in found.items()}


def inner_names(values):
    return {name.removeprefix("net.").removeprefix("module."): v for name, v in values.items()}


def whole(state):
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    return state.full_tensor() if hasattr(state, "full_tensor") else state


class Around(nn.Module):
    """A model of which a part is wrapped."""

    def __init__(self, net):
        super().__init__()
        self.net = DistributedDataParallel(net)

    def forward(self, x):
        return self.net(x)


WRAPS = {
    "views": lambda net: DistributedDataParallel(net, gradient_as_bucket_view=True),
    "static graph": lambda net: DistributedDataParallel(net, static_graph=True),
    "a part": Around,
}


@pytest.mark.parametrize("habit", ["evaluation", "accumulation", "zeros", "state", "plain state"])
@pytest.mark.parametrize("name", NAMES)
def test_what_a_loop_does_beside_the_steps(processes, name, habit):
    check(processes, name, habit)


@pytest.mark.parametrize("habit", ["evaluation", "accumulation"])
@pytest.mark.parametrize(("method", "loop"), [("ewc all", "by hand"), ("rwalk", "attached")])
def test_the_same_for_other_loops(processes, method, loop, habit):
    check(processes, "fsdp", habit, method, loop)


@pytest.mark.parametrize("habit", WRAPS)
def test_options_of_ddp(processes, habit):
    check(processes, "ddp", habit)


def check(processes, name, *case):
    expected = taught("single", None, *case[1:])
    first, *others = processes(WAYS[name].ranks).run(taught, name, *case)
    assert_close(first, expected, 1e-9)
    for other in others:
        assert_same_state(other, first)


# ---------------------------------------------------------------------- whose data it is


def of_a_group():
    """Two of three processes train together; the third has no part in it."""
    group = dist.new_group([0, 1])
    if dist.get_rank() == 2:
        return None
    method = clext.EWC(DistributedDataParallel(make_network(), process_group=group))
    method.consolidate(make_loader(0, WAYS["ddp"]))
    return state_of(method)["importance"]


def test_the_processes_are_those_of_the_wrapper(processes):
    method = clext.EWC(make_network())
    method.consolidate(all_batches(0, 1))
    expected = state_of(method)["importance"]
    for found in processes(3).run(of_a_group)[:2]:
        assert_close(found, expected, 1e-12)


# ---------------------------------------------------------------------- saving


def flat(name, folder):
    way, model, method, _, step = begun(name)
    for x, y in make_steps(0, way):
        F.cross_entropy(model(x), y).backward()
        step()
        model.zero_grad()
    method.consolidate()
    dcp.save({"model": model, "method": method.flat_state_dict()}, checkpoint_id=folder)
    _, model, other, _, _ = begun(name)
    entries = {"model": model, "method": other.flat_state_dict()}
    dcp.load(entries, checkpoint_id=folder)
    other.load_flat_state_dict(entries["method"])
    return whole(other.state_dict()), whole(method.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_flat_state_goes_into_a_checkpoint(processes, tmp_path, name):
    for found, expected in processes(WAYS[name].ranks).run(flat, name, tmp_path):
        assert_same_state(found, expected)
