"""What real models bring: norms in sequence parallel, batch statistics, padding, other names."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from sharded_models import mesh
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import clext


def rank():
    return torch.distributed.get_rank()


# ---------------------------------------------------------------------- sequence parallel


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.last(self.down(self.up(self.norm(x)).relu()))).mean(1)


def split_by_position(model):
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "last": SequenceParallel(),
        "head": PrepareModuleInput(
            input_layouts=Shard(1), desired_input_layouts=Replicate(), use_local_output=True
        ),
    }
    return parallelize_module(model, mesh(("model", 2)), plan)


def sequence_parallel_step(fused, is_split):
    torch.manual_seed(1)
    model = Sequences().double()
    nn.init.normal_(model.norm.weight)
    x, y = torch.randn(6, 4, 8, dtype=torch.float64), torch.randint(3, (6,))
    if is_split:
        model, x = split_by_position(model), x.chunk(2, 1)[rank()]
    method = clext.SI(model, strength=5.0, sync=is_split)
    for name, value in method.importance.items():
        method.importance[name] = torch.ones(value.shape, dtype=value.dtype)
        method.anchor[name] = torch.zeros(value.shape, dtype=value.dtype)
    if fused:
        optimizer = clext.optim.SGD(model.parameters(), lr=0.1, method=method, max_grad_norm=0.1)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method.attach(optimizer)
    for _ in range(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = {**dict(model.named_parameters()), **method._state.view("path")}
    return {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in found.items()}


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_that_are_shares_of_a_sum(processes, fused):
    expected = sequence_parallel_step(fused, is_split=False)
    for found in processes(2).run(sequence_parallel_step, fused, True):
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-12), name


# ---------------------------------------------------------------------- under DDP


class WithStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x):
        return self.net(x)


def batch_statistics():
    torch.manual_seed(0)
    model = DistributedDataParallel(WithStatistics().double())
    ewc, lwf, agem = clext.EWC(model), clext.LwF(model), clext.AGEM(model, per_task=3, batch=3)
    torch.manual_seed(rank())  # each sees other data, and has other statistics of them
    for _ in range(4):
        x = torch.randn(16, 4, dtype=torch.float64) * (1 + rank())
        F.cross_entropy(model(x), torch.randint(2, (16,))).backward()
        model.zero_grad()
    torch.manual_seed(9)
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(2, (40,))
    for method in (ewc, lwf, agem):
        method.consolidate([(x[rank() :: 2], y[rank() :: 2])])
    alone = clext.EWC(model.module, sync=False)
    alone.consolidate([(x, y)])
    F.cross_entropy(model(x), y).backward()
    agem.add_penalty_grad_()  # three examples are too few to share where statistics are of a batch
    return ewc.state_dict()["state"], alone.state_dict()["state"], lwf._teacher(x)


def test_batch_statistics_are_those_of_one_process(processes):
    first, second = processes(2).run(batch_statistics)
    assert torch.equal(first[2], second[2])
    for ours, alone, _ in (first, second):
        for name, value in alone["importance"].items():
            assert torch.allclose(ours["importance"][name], value, rtol=1e-12), name
            assert torch.equal(ours["importance"][name], first[0]["importance"][name])


class Causal(nn.Module):
    """As Transformers' causal models: a loss of the next tokens, and a buffer that DDP sends."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, input_ids, labels=None):
        logits = self.head(self.embedding(input_ids).tanh()) * self.scale
        if labels is None:
            return {"logits": logits}
        following = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"logits": logits, "loss": following}


def causal_models(kind):
    torch.manual_seed(0)
    model = DistributedDataParallel(Causal())
    method = getattr(clext, kind)(model)
    ids = torch.randint(10, (4, 8))
    batch = {"input_ids": ids, "labels": ids}
    method.consolidate([batch] * (4 if rank() == 0 else 2))
    model(**batch)["loss"].backward()
    method.add_penalty_grad_()
    return method.tasks


@pytest.mark.parametrize("kind", ["EWC", "AGEM"])
def test_labels_of_the_next_token_and_batches_of_other_numbers(processes, kind):
    assert processes(2).run(causal_models, kind) == [1, 1]


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)

    def forward(self, x):
        return self.head(self.embedding(x).tanh())


def memory_of_padded_sequences():
    torch.manual_seed(3)
    start = Tokens().double()
    x, y = torch.randint(10, (4, 7)), torch.randint(10, (4, 7))
    y[0, 1:] = -100  # of seven labels one counts

    def changes(model, sync, chosen):
        method = clext.AGEM(model, sync=sync, forward=lambda m, b: m(b[0]), labels=lambda b: b[1])
        method._weights = lambda gram: torch.ones(1, dtype=gram.dtype)  # whatever the product is
        method.consolidate([(x[chosen], y[chosen])])
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        method.add_penalty_grad_()
        return [parameter.grad for parameter in model.parameters()]

    wrapped = DistributedDataParallel(copy.deepcopy(start))
    together = changes(wrapped, True, slice(rank(), None, 2))
    return together, changes(copy.deepcopy(start), False, slice(None))


def test_shares_of_a_memory_count_by_their_labels(processes):
    for together, alone in processes(2).run(memory_of_padded_sequences):
        for found, value in zip(together, alone, strict=True):
            assert torch.allclose(found, value, rtol=1e-10)


# ---------------------------------------------------------------------- under FSDP2


def nan_in_one_shard(kind):
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    method = getattr(clext, kind)(model)
    optimizer = clext.optim.SGD(model.parameters(), lr=0.1, method=method)
    F.cross_entropy(model(torch.randn(4, 4)), torch.tensor([0, 1, 0, 1])).backward()
    if rank() == 1:
        model[0].weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    with pytest.raises(ValueError, match=r"'0.weight' holds NaN"):
        method.consolidate()
    return method.tasks


@pytest.mark.parametrize("kind", ["SI", "RWalk"])
def test_nan_in_one_shard_is_everybodys(processes, kind):
    assert processes(2).run(nan_in_one_shard, kind) == [0, 0]


def state_of_other_shards():
    """A head with as many rows as processes has one in each part."""
    torch.manual_seed(0)
    whole = nn.Linear(4, 2)
    model = fully_shard(copy.deepcopy(whole))
    sharded, plain = clext.EWC(model), clext.EWC(whole, sync=False)
    sharded.importance["weight"] = value = torch.arange(8.0).view(2, 4)
    plain.load_state_dict(sharded.state_dict())
    optimizer = clext.optim.Adam(whole.parameters())
    given = clext.optim.Adam(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    given.step()
    optimizer.load_state_dict(given.state_dict())
    average = given.state[model.weight]["exp_avg"].full_tensor()
    assert torch.equal(optimizer.state[whole.weight]["exp_avg"], average)
    return torch.equal(plain.importance["weight"], value)


def test_sharded_state_loads_whole(processes):
    assert processes(2).run(state_of_other_shards) == [True, True]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

    def encode(self, x):
        return self.second(self.first(x).relu())

    def forward(self, x):
        return self.encode(x)


def another_forward():
    torch.manual_seed(0)
    start = Encoder().double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(2, (6,))
    alone = clext.EWC(start, sync=False)
    alone.consolidate([(x, y)])
    model = fully_shard(copy.deepcopy(start))
    register_fsdp_forward_method(model, "encode")
    method = clext.EWC(model, forward=lambda m, batch: m.encode(batch[0]))
    method.consolidate([(x[rank() :: 2], y[rank() :: 2])])
    found = {name: value.full_tensor() for name, value in method.importance.items()}
    assert isinstance(model.encode(x), torch.Tensor)  # and is FSDP2's again
    return all(torch.allclose(found[n], v, rtol=1e-12) for n, v in alone.importance.items())


def test_a_forward_of_another_name(processes):
    assert processes(2).run(another_forward) == [True, True]


def crossing_meshes():
    grid = mesh(("rows", 2), ("columns", 2))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    fully_shard(model[0], mesh=grid["rows"])
    fully_shard(model[1], mesh=grid["columns"])
    with pytest.raises(ValueError, match="sharded over meshes that cross"):
        clext.EWC(model)


def test_meshes_that_cross(processes):
    processes(4).run(crossing_meshes)
