"""Every kind of layer is measured on processes as on one, and at no other price."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from importance_models import make_batches
from layer_models import FALLBACK, RULED
from sharded_training import assert_close, state_of
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from toy_training import assert_same_state

import clext
from clext.importance import SlowImportanceWarning

MODELS = {**RULED, **{name: make for name, (make, _) in FALLBACK.items()}}
# fully_shard takes neither other layouts, nor sparse gradients, nor parameters without dimensions.
NOT_ON_SHARDS = {"2d channels last", "sparse embedding", "parameters by themselves"}
ESTIMATES = [(clext.EWC, {}), (clext.EWC, {"fisher": "exact"}), (clext.MAS, {}), (clext.SCP, {})]
WRAPPERS = {"ddp": DistributedDataParallel, "fsdp": fully_shard}
CASES = [
    (way, name)
    for way in WRAPPERS
    for name in MODELS
    if not (way == "fsdp" and name in NOT_ON_SHARDS)
]


def measured(name, way=None):
    """Importances by each estimate; on two processes of every other batch."""
    batches = make_batches((4, 1, 5, 2), features=24)
    found = {}
    for number, (kind, options) in enumerate(ESTIMATES):
        torch.manual_seed(0)
        model = MODELS[name]().double()
        if way is not None:
            model = WRAPPERS[way](model)
        method = kind(model, **options)
        with warnings.catch_warnings():
            if name in RULED:
                warnings.simplefilter("error", SlowImportanceWarning)
            method.consolidate(batches if way is None else batches[dist.get_rank() :: 2])
        found[number] = state_of(method)["importance"]
    return found


@pytest.mark.parametrize(("way", "name"), CASES)
@pytest.mark.filterwarnings("ignore::clext.importance.SlowImportanceWarning")
def test_a_layer(processes, way, name):
    expected = measured(name)
    first, second = processes(2).run(measured, name, way)
    assert_close(first, expected, 1e-11)
    assert_same_state(second, first)
