"""Two tasks on processes end as they do on one: parameters, importances, anchors, penalties."""

from __future__ import annotations

import functools

import pytest
import torch
from sharded_models import WAYS
from sharded_training import LOOPS, METHODS, assert_close, trained
from toy_training import assert_same_state

reference = functools.cache(trained)
PART = {torch.float64: 1e-9, torch.float32: 1e-5}
SMALL = ["ddp", "fsdp uneven", "tp"]
LARGE = ["fsdp+tp", "hsdp"]


def check(processes, name, method, loop, dtype):
    way = WAYS[name]
    expected = reference("single", method, loop, dtype, way.shares)
    first, *others = processes(way.ranks).run(trained, name, method, loop, dtype)
    for other in others:
        assert_same_state(other, first)
    for key, value in expected.items():
        # What is made of differences of parameters, or of single gradients, is less exact.
        part = PART[dtype] if key == "parameters" else 10 * PART[dtype]
        assert_close({key: first[key]}, {key: value}, part)


# Those that follow the steps go through every loop; to the others all loops are alike.
PATHS = ["si", "rwalk", "rwalk released"]
CASES = [
    *((method, loop) for method in PATHS for loop in ("attached", "fused sgd")),
    *((method, "by hand") for method in METHODS if method != "ewc optimizer"),
    *((method, "fused adam") for method in METHODS),
]


@pytest.mark.parametrize(("method", "loop"), CASES)
@pytest.mark.parametrize("name", SMALL)
def test_every_method(processes, name, method, loop):
    check(processes, name, method, loop, torch.float64)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", ["si", "ewc empirical"])
@pytest.mark.parametrize("name", SMALL)
def test_every_loop_in_single_precision(processes, name, method, loop):
    check(processes, name, method, loop, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "loop"),
    [("si", "fused adamw"), ("rwalk", "by hand"), ("ewc all", "attached"), ("scp", "fused sgd")],
)
@pytest.mark.parametrize("name", LARGE)
def test_two_dimensions_of_processes(processes, name, method, loop):
    check(processes, name, method, loop, torch.float64)
