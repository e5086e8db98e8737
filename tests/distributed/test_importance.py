"""What `consolidate` measures on processes is what one process measures on all of the data."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sharded_models import (
    BATCH,
    CLASSES,
    EXAMPLES,
    WAYS,
    all_batches,
    make_examples,
    make_loader,
    make_network,
    make_steps,
)
from sharded_training import METHODS, assert_close, state_of
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from toy_training import assert_same_state

import clext

# Nothing is trained here.
pytestmark = pytest.mark.filterwarnings("ignore:.*saw no step of this task")

PART = {torch.float64: 1e-12, torch.float32: 1e-6}
NAMES = ["ddp", "fsdp", "fsdp uneven", "tp"]
ON_DATA = [name for name in METHODS if name.startswith(("ewc", "mas", "scp"))]
ON_DATA.remove("ewc optimizer")


def measured(name, method_name, dtype, shares=1, more=()):
    """State after two tasks, between which the parameters have changed."""
    way = WAYS[name]
    model = way.wrap(make_network(dtype))
    kind, options = METHODS[method_name]
    method = kind(model, **{**options, **dict(more)})
    for task in range(2):
        if way.ranks == 1:
            method.consolidate(all_batches(task, shares, dtype))
        else:
            method.consolidate(make_loader(task, way, dtype))
        with torch.no_grad():
            for entry in model.parameters():
                entry.mul_(1.1)
    state = state_of(method)
    return {**state, "constant": getattr(method, "constant", 0.0)}


reference = functools.cache(measured)


@pytest.mark.parametrize("dtype", PART)
@pytest.mark.parametrize("method", ON_DATA)
@pytest.mark.parametrize("name", NAMES)
def test_every_estimator(processes, name, method, dtype):
    way = WAYS[name]
    expected = reference("single", method, dtype, way.shares)
    first, *others = processes(way.ranks).run(measured, name, method, dtype)
    assert_close(first, expected, PART[dtype])
    for other in others:
        assert_same_state(other, first)


@pytest.mark.parametrize("samples", [7, 12, EXAMPLES, 100])
@pytest.mark.parametrize("method", ["ewc empirical", "ewc all", "mas", "scp"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_a_total_over_the_processes(processes, name, method, samples):
    # The sampler deals examples out one by one, so that the first of all are the first of each.
    more = (("samples", samples),)
    expected = reference("single", method, torch.float64, 1, more)
    for found in processes(WAYS[name].ranks).run(measured, name, method, torch.float64, 1, more):
        assert_close(found, expected, 1e-12)


# ---------------------------------------------------------------------- loaders

EWC = {"strength": 1.0}


def shuffled(rank, ranks):
    data = make_examples(0)
    sampler = DistributedSampler(data, ranks, rank, shuffle=True, seed=3)
    sampler.set_epoch(5)
    return DataLoader(data, BATCH, sampler=sampler)


def in_batches_of_a_sampler(rank, ranks):
    data = make_examples(0)
    sampler = DistributedSampler(data, ranks, rank, shuffle=False)
    return DataLoader(data, batch_sampler=BatchSampler(sampler, BATCH, drop_last=False))


def uneven(rank, ranks):
    """Lists of batches, of which the second process has far fewer."""
    inputs, labels = make_examples(0).tensors
    part = slice(2) if rank == 1 else slice(2, None)
    rows = torch.arange(EXAMPLES)[part] if rank < 2 else torch.arange(0)
    return [(inputs[chosen], labels[chosen]) for chosen in rows.split(BATCH)]


LOADERS = {
    "shuffled": shuffled,
    "batch sampler": in_batches_of_a_sampler,
    "uneven": uneven,
}


def with_loader(name):
    method = clext.EWC(DistributedDataParallel(make_network()), **EWC)
    method.consolidate(LOADERS[name](dist.get_rank(), dist.get_world_size()))
    return state_of(method)


def of_all(batches):
    method = clext.EWC(make_network(), **EWC)
    method.consolidate(batches)
    return state_of(method)


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(processes, name):
    expected = of_all(all_batches(0, 1))
    first, second = processes(2).run(with_loader, name)
    assert_close(first, expected, 1e-12)
    assert_same_state(second, first)


def dropping():
    method = clext.EWC(DistributedDataParallel(make_network()), **EWC)
    data = make_examples(0)
    sampler = DistributedSampler(data, 2, dist.get_rank(), shuffle=False, drop_last=True)
    method.consolidate(DataLoader(data, BATCH, sampler=sampler))
    return state_of(method)


def test_a_sampler_that_drops_the_last_pads_nothing(processes):
    inputs, labels = make_examples(0).tensors
    expected = of_all([(inputs[:24], labels[:24])])
    for found in processes(2).run(dropping):
        assert_close(found, expected, 1e-12)


def padding_alone(count):
    inputs, labels = make_examples(0).tensors
    data = TensorDataset(inputs[:count], labels[:count])
    sampler = DistributedSampler(data, shuffle=False)
    method = clext.EWC(DistributedDataParallel(make_network()), **EWC)
    method.consolidate(DataLoader(data, BATCH, sampler=sampler))
    return state_of(method)


@pytest.mark.parametrize(("ranks", "count"), [(2, 1), (3, 1), (3, 2)])
def test_a_process_that_has_padding_alone(processes, ranks, count):
    inputs, labels = make_examples(0).tensors
    expected = of_all([(inputs[:count], labels[:count])])
    for found in processes(ranks).run(padding_alone, count):
        assert_close(found, expected, 1e-12)


def labels_that_count(counting):
    """The labels of processes that are not `counting` do not count."""
    batches = make_loader(0, WAYS["ddp"])
    if dist.get_rank() not in counting:
        batches = [(x, torch.full_like(y, -100)) for x, y in batches]
    method = clext.EWC(DistributedDataParallel(make_network()), **EWC)
    try:
        method.consolidate(batches)
    except ValueError as error:
        return str(error)
    return {"importance": state_of(method)["importance"], "tasks": method.tasks}


def test_labels_that_count_may_be_those_of_one_process(processes):
    inputs, labels = make_examples(0).tensors
    rows = torch.tensor([*range(0, EXAMPLES, 2), *range(1, EXAMPLES, 2), 0])  # lists pad, too
    labels = labels[rows]
    labels[13:] = -100
    expected = {"importance": of_all([(inputs[rows], labels)])["importance"], "tasks": 1}
    for found in processes(2).run(labels_that_count, (0,)):
        assert_close(found, expected, 1e-12)
    for found in processes(2).run(labels_that_count, ()):
        assert "none counts" in found


def without_communication():
    """Each process by itself, though the model is wrapped."""
    method = clext.EWC(DistributedDataParallel(make_network()), sync=False, **EWC)
    inputs, labels = make_examples(0).tensors
    rows = slice(10) if dist.get_rank() == 0 else slice(10, None)
    if dist.get_rank() == 0:  # the other one has no part in it
        method.consolidate([(inputs[rows], labels[rows])])
    return state_of(method)


def test_sync_false_measures_by_itself(processes):
    inputs, labels = make_examples(0).tensors
    first, second = processes(2).run(without_communication)
    assert_close(first, of_all([(inputs[:10], labels[:10])]), 1e-12)
    assert not any(value.any() for value in second["importance"].values())


# ---------------------------------------------------------------------- where it is kept


def placements(name):
    model = WAYS[name].wrap(make_network())
    method = clext.SI(model)
    with torch.no_grad():
        model(make_steps(0, WAYS[name])[0][0])  # after which FSDP2's root holds whole parameters
    method.consolidate()
    saved = method.state_dict()["state"]
    found = {}
    for key, parameter in model.named_parameters():
        key = key.removeprefix("module.")
        values = (method.importance[key], method.anchor[key], saved["importance"][key])
        for value in values:
            assert type(value) is type(parameter.data), (key, type(value))
        if isinstance(parameter, DTensor):
            for value in values:
                assert value.placements == parameter.placements
                assert value.device_mesh == parameter.device_mesh
                assert value.to_local().shape == parameter.to_local().shape
            found[key] = parameter.to_local().numel()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_state_is_placed_as_the_parameter_is(processes, name):
    sizes = processes(WAYS[name].ranks).run(placements, name)
    if name.startswith("fsdp"):
        assert [entry["first.gate.bias"] for entry in sizes] == [1] + [0] * (len(sizes) - 1)
    assert bool(sizes[0]) == (name != "ddp")


# ---------------------------------------------------------------------- the example


def one_layer(wrapped):
    torch.manual_seed(0)
    model = nn.Linear(20, CLASSES).double()
    model = DistributedDataParallel(model) if wrapped else model
    reg = clext.EWC(model, strength=20.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    random = torch.Generator().manual_seed(0)
    for _ in range(2):
        inputs = torch.randn(512, 20, generator=random).double()
        data = TensorDataset(inputs, torch.randint(CLASSES, (512,), generator=random))
        # 64 examples of all processes in a step.
        sampler = DistributedSampler(data, shuffle=False) if wrapped else None
        loader = DataLoader(data, 32 if wrapped else 64, sampler=sampler)
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            reg.add_penalty_grad_()
            optimizer.step()
            reg.update()
            optimizer.zero_grad()
        reg.consolidate(loader)
    values = [entry.detach().clone() for entry in model.parameters()]
    return {"parameters": dict(enumerate(values)), **state_of(reg)}


def test_a_linear_layer_on_512_examples(processes):
    expected = one_layer(False)
    first, second = processes(2).run(one_layer, True)
    assert_close(first, expected, 1e-12)
    assert_same_state(second, first)
    assert first["importance"]["weight"].shape == (CLASSES, 20)
