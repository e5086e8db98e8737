"""FSDP2's policies, models that change, and copies that drifted apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sharded_models import (
    CLASSES,
    FEATURES,
    WAYS,
    all_batches,
    make_loader,
    make_network,
    make_steps,
    plain,
    plain_parameters,
)
from sharded_training import assert_close, state_of, train_task
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_training import assert_same_state

import clext

POLICIES = {
    "plain": {},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "mixed": {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)},
    "whole after forward": {"reshard_after_forward": False},
}


def sharded(model, **policy):
    for part in (model.first, model.second, model.head):
        fully_shard(part, **policy)
    return fully_shard(model, **policy)


def by_policy(policy, dtype, is_fused, is_measured=False):
    """Two tasks with SI, or EWC, by the same rule of Adam in one pass or attached to it."""
    way = WAYS["fsdp"]
    model = sharded(make_network(dtype), **POLICIES[policy])
    method = clext.EWC(model, strength=20.0) if is_measured else clext.SI(model, strength=50.0)
    if is_fused:
        optimizer = clext.optim.Adam(model.parameters(), lr=0.02, method=method)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        method.attach(optimizer)
    for task in range(2):
        for x, y in make_steps(task, way, dtype=dtype):
            F.cross_entropy(model(x).to(dtype), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        method.consolidate(make_loader(task, way, dtype))
    return {"parameters": plain_parameters(model), **state_of(method)}


@pytest.mark.parametrize("policy", ["offload", "whole after forward"])
@pytest.mark.parametrize("is_measured", [True, False])
def test_a_policy_that_changes_no_number(processes, policy, is_measured):
    expected = processes(2).run(by_policy, "plain", torch.float64, True, is_measured)
    found = processes(2).run(by_policy, policy, torch.float64, True, is_measured)
    assert_same_state(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.mark.parametrize("is_measured", [True, False])
def test_mixed_precision_leaves_the_method_what_it_is(processes, is_measured):
    fused, second = processes(2).run(by_policy, "mixed", torch.float32, True, is_measured)
    attached, _ = processes(2).run(by_policy, "mixed", torch.float32, False, is_measured)
    assert_close(fused, attached, 1e-4)
    assert_same_state(second, fused)


def measured_in_mixed_precision(policy):
    method = clext.EWC(sharded(make_network(torch.float32), **POLICIES[policy]))
    method.consolidate(make_loader(0, WAYS["fsdp"], torch.float32))
    return state_of(method)["importance"]


def test_importance_is_measured_in_the_precision_of_the_parameters(processes):
    method = clext.EWC(make_network(torch.float32))
    method.consolidate(all_batches(0, 1, torch.float32))
    expected = state_of(method)["importance"]
    for found in processes(2).run(measured_in_mixed_precision, "mixed"):
        assert_close(found, expected, 1e-6)


# ---------------------------------------------------------------------- a head that grows


def grown(name):
    """Two tasks, and a head with two outputs more for the second."""
    way, net = WAYS[name], make_network()
    model = sharded(net) if name == "fsdp" else way.wrap(net)
    method = clext.RWalk(model, strength=2.0, interval=4)
    for task in range(2):
        if task == 1:
            old, head = plain_parameters(net), nn.Linear(FEATURES, CLASSES + 2).double()
            with torch.no_grad():
                for key in ("weight", "bias"):
                    getattr(head, key).fill_(0.1)[:CLASSES] = old[f"head.{key}"]
            net.head = fully_shard(head) if name == "fsdp" else head
            model = DistributedDataParallel(net) if name == "ddp" else model
            method.refresh_parameters()
        optimizer = clext.optim.Adam(model.parameters(), lr=0.02, method=method)

        def step(optimizer=optimizer):
            optimizer.step()
            return optimizer.penalty

        penalties = train_task(way, model, optimizer, step, task)
        method.consolidate()
    return {"penalties": penalties, "parameters": plain_parameters(model), **state_of(method)}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_a_head_that_grows_keeps_the_state_of_its_old_rows(processes, name):
    expected = grown("single")
    for found in processes(2).run(grown, name):
        assert_close(found, expected, 1e-9)
        assert max(found["penalties"]) > 0


# ---------------------------------------------------------------------- copies


def drifted(is_synchronous):
    """Copies that are trained apart, each on its own steps."""
    model = make_network()
    method = clext.SI(model, sync=is_synchronous)
    optimizer = clext.optim.SGD(model.parameters(), lr=0.1, method=method)
    for x, y in make_steps(0, WAYS["ddp"]):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = method.state_dict()
    if is_synchronous:
        with pytest.raises(ValueError, match="differs between the 2 processes"):
            method.consolidate()
        assert_same_state(method.state_dict(), before)
    else:
        method.consolidate()
    return plain(model.head.weight), method.tasks


@pytest.mark.parametrize("is_synchronous", [True, False])
def test_copies_that_differ_are_an_error_unless_they_are_meant_to(processes, is_synchronous):
    (first, tasks), (second, _) = processes(2).run(drifted, is_synchronous)
    assert not torch.equal(first, second)
    assert tasks == (not is_synchronous)
