"""Every kind of layer is measured by its rule where it is sharded, too."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from importance_models import make_batches
from layer_models import FALLBACK, RULED
from sharded_training import assert_close, state_of
from torch.distributed.fsdp import fully_shard
from toy_training import assert_same_state

import clext
from clext.importance import SlowImportanceWarning

MODELS = {**RULED, **{name: make for name, (make, _) in FALLBACK.items()}}
# fully_shard takes neither other layouts, nor sparse gradients, nor parameters without dimensions.
NOT_ON_SHARDS = {"2d channels last", "sparse embedding", "parameters by themselves"}
ESTIMATES = {"ewc": clext.EWC, "scp": clext.SCP}


def measured(name, is_sharded):
    """Importances by each estimate; on two processes of every other batch."""
    batches = make_batches((4, 1, 5, 2), features=24)
    found = {}
    for key, kind in ESTIMATES.items():
        model = copy.deepcopy(MODELS[name]()).double()  # some share a layer
        torch.manual_seed(1)
        with torch.no_grad():
            for entry in model.parameters():
                entry.copy_(torch.randn(entry.shape).double() / 2)
        method = kind(fully_shard(model) if is_sharded else model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if name in RULED:
                warnings.simplefilter("error", SlowImportanceWarning)
            method.consolidate(batches[dist.get_rank() :: 2] if is_sharded else batches)
        found[key] = state_of(method)["importance"]
    return found


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NOT_ON_SHARDS])
def test_a_sharded_layer(processes, name):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes: some models have statistics made in float32
    try:
        expected = measured(name, False)
    finally:
        torch.set_num_threads(threads)
    first, second = processes(2).run(measured, name, True)
    assert_close(first, expected, 1e-11)
    assert_same_state(second, first)
