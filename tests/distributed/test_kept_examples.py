"""Methods that keep examples or a copy of the model, under DDP: all processes end alike."""

from __future__ import annotations

import pytest
import torch
from sharded_models import FEATURES, WAYS, make_network, plain_parameters
from sharded_training import assert_close
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from toy_training import assert_same_state

import clext

TASKS, EXAMPLES, BATCH = 2, 25, 8  # of all processes


def _combined(model):
    return clext.Combined(clext.EWC(model, strength=20.0), clext.LwF(model))


# Here nothing is drawn: one process that has all of the data does the same.
UNDRAWN = {
    "gem": (clext.GEM, {}),
    "agem": (clext.AGEM, {}),
    "lwf": (clext.LwF, {}),
    "lwf and ewc": (_combined, {}),
    "kfac": (clext.KFAC, {"fisher": "exact", "strength": 20.0}),
}
DRAWN = {
    "gem": (clext.GEM, {"per_task": 6}),
    "agem": (clext.AGEM, {"per_task": 6, "batch": 4}),
    "replay": (clext.Replay, {"budget": 10}),
    "replay balanced": (clext.Replay, {"budget": 9, "policy": "balanced"}),
    "icarl": (clext.ICaRL, {"budget": 8, "features": "head"}),
    "dgr": (clext.DGR, {"hidden": (8,), "latent": 2}),
}


def make_data(task, count=EXAMPLES):
    """Inputs in [0, 1] and two classes of a growing head."""
    random = torch.Generator().manual_seed(300 + task)
    inputs = torch.rand(count, FEATURES, generator=random, dtype=torch.float64)
    return TensorDataset(inputs, torch.randint(2, (count,), generator=random) + 2 * task)


def make_loader(task, way, count=EXAMPLES):
    data = make_data(task, count)
    sampler = DistributedSampler(data, way.shares, way.share, shuffle=False)
    return DataLoader(data, BATCH // way.shares, sampler=sampler)


def taught(name, kind, options, count=EXAMPLES):
    """All that is alike on the processes: parameters, and what the method keeps."""
    way = WAYS[name]
    model = way.wrap(make_network())
    method = kind(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for task in range(TASKS):
        method.begin_task(block=range(2 * task, 2 * task + 2), active=range(2 * task + 2))
        for _ in range(2):
            # Full batches alone, the mean over which is that of the processes' means.
            for x, y in list(make_loader(task, way, count))[: EXAMPLES // BATCH]:
                method.loss(x, y).backward()
                method.add_penalty_grad_()
                optimizer.step()
                method.update()
                optimizer.zero_grad()
        method.consolidate(make_loader(task, way, count))
    return {"parameters": plain_parameters(model), "state": without_random(method.state_dict())}


def without_random(state):
    """The state but for generators, which may draw other examples on each process."""
    if isinstance(state, dict):
        return {key: without_random(value) for key, value in state.items() if key != "random"}
    return state


@pytest.mark.parametrize("method", UNDRAWN)
def test_what_draws_nothing_is_as_on_one_process(processes, method):
    expected = taught("single", *UNDRAWN[method])["parameters"]
    first, second = processes(2).run(taught, "ddp", *UNDRAWN[method])
    assert_close(first["parameters"], expected, 1e-9)
    assert_same_state(second, first)


@pytest.mark.parametrize("method", DRAWN)
def test_what_draws_ends_alike_on_all_processes(processes, method):
    first, second = processes(2).run(taught, "ddp", *DRAWN[method])
    assert_same_state(second, first)


def test_processes_together_replay_what_one_does(processes):
    """All that is kept, in each step: half of it on each process."""
    expected = taught("single", clext.Replay, {"batch": 24}, 24)["parameters"]
    first, second = processes(2).run(taught, "ddp", clext.Replay, {"batch": 12}, 24)
    assert_close(first["parameters"], expected, 1e-9)
    assert_same_state(second, first)


# ---------------------------------------------------------------------- what is kept


def memory(budget):
    """Labels and inputs that replay and GEM keep of a task, and what replay draws in a step."""
    way = WAYS["ddp"]
    model, inputs = way.wrap(make_network()), []
    replay, gem = clext.Replay(model, budget=budget), clext.GEM(model, per_task=budget)
    replay.consolidate(make_loader(0, way))
    gem.consolidate(make_loader(0, way))
    model.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    x, y = next(iter(make_loader(1, way)))
    replay.loss(x, y)
    return replay.state_dict()["extra"]["memory"], gem.state_dict()["extra"], inputs[-1][len(x) :]


def rows(inputs):
    return sorted(map(tuple, inputs.tolist()))


@pytest.mark.parametrize("kept", [10, EXAMPLES, 100])
def test_examples_are_kept_from_all_shares_and_each_once(processes, kept):
    data = rows(make_data(0).tensors[0])
    for replayed, projected, _ in processes(2).run(memory, kept):
        for found in (replayed, projected):
            chosen = rows(found["inputs"])
            assert len(chosen) == len(set(chosen)) == min(kept, EXAMPLES)
            assert set(chosen) <= set(data)
            if kept == 10:
                for share in range(2):
                    assert set(chosen) & set(rows(make_data(0).tensors[0][share::2]))


def test_no_two_processes_replay_the_same_example_in_a_step(processes):
    (_, _, first), (_, _, second) = processes(2).run(memory, 100)
    drawn = rows(first) + rows(second)
    assert len(set(drawn)) == BATCH


def looked_at():
    """What the model runs over in a step of A-GEM, of the memory."""
    way = WAYS["ddp"]
    model, inputs = way.wrap(make_network()), []
    method = clext.AGEM(model, batch=8)
    method.consolidate(make_loader(0, way))
    x, y = next(iter(make_loader(1, way)))
    method.loss(x, y).backward()
    model.module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    method.add_penalty_grad_()
    return torch.cat(inputs)


def test_processes_share_what_agem_looks_at_in_a_step(processes):
    shares = processes(2).run(looked_at)
    looked = [row for share in shares for row in rows(share)]
    assert list(map(len, shares)) == [4, 4]
    assert len(set(looked)) == 8
    assert set(looked) <= set(rows(make_data(0).tensors[0]))


# ---------------------------------------------------------------------- a memory for each process

STREAMED = {
    "der": (clext.DER, {"budget": 10}),
    "derpp": (clext.DERpp, {"budget": 10}),
    "er-ace": (clext.ERACE, {"budget": 10}),
    "replay": (clext.Replay, {"budget": 10, "policy": "stream"}),
}


@pytest.mark.parametrize("method", STREAMED)
def test_what_follows_the_stream_keeps_a_memory_of_each_process(processes, method):
    kind, options = STREAMED[method]
    first, second = processes(2).run(taught, "ddp", kind, {**options, "sync": False})
    assert_close(first["parameters"], second["parameters"], 0.0)
    # DER keeps a tree: the inputs beside their logits.
    kept = [found["state"]["extra"]["memory"]["inputs"] for found in (first, second)]
    inputs = [rows(entry["inputs"] if isinstance(entry, dict) else entry) for entry in kept]
    assert list(map(len, inputs)) == [10, 10]
    assert not set(inputs[0]) & set(inputs[1]), "each sees its share alone"


def one_loss(kind, options):
    way = WAYS["ddp"]
    method = kind(way.wrap(make_network()), **options)
    with pytest.raises(ValueError, match=r"policy='stream' follows .* or sync=False for a memory"):
        method.loss(*next(iter(make_loader(0, way))))


@pytest.mark.parametrize("method", STREAMED)
def test_what_follows_the_stream_says_so_where_processes_work_together(processes, method):
    processes(2).run(one_loss, *STREAMED[method])
