"""State is sharded as the parameters are: each process keeps its part of the bytes."""

from __future__ import annotations

import pytest
from sharded_models import WAYS, Network

import clext
from clext.core.sharding import local

METHODS = {"EWC": 8, "SI": 12, "RWalk": 28}  # bytes for a parameter


def kept(name, method):
    """Bytes of the state here, of this process's parameters as numbers, and of all."""
    model = WAYS[name].wrap(Network(64, 126).float())
    state = getattr(clext, method)(model)._state
    buffers = {e.untyped_storage().data_ptr(): e for es in state.lists.values() for e in es}
    nbytes = sum(entry.untyped_storage().nbytes() for entry in buffers.values())
    parameters = list(model.parameters())
    return nbytes, sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "ranks"), [("fsdp", 2), ("fsdp uneven", 3)])
def test_state_is_as_large_as_the_shard(processes, name, ranks, method):
    found = processes(ranks).run(kept, name, method)
    assert sum(own for _, own, _ in found) == found[0][2]
    for nbytes, own, total in found:
        # Each list of each parameter begins at a cache line.
        assert METHODS[method] * own <= nbytes <= METHODS[method] * own + 28 * 16 * 64
        assert nbytes < 1.1 * METHODS[method] * total / ranks
