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
SMALL = ["ddp", "fsdp", "fsdp uneven", "tp"]
LARGE = ["fsdp+tp", "hsdp"]


def check(processes, name, method, loop, dtype):
    way = WAYS[name]
    expected = reference("single", method, loop, dtype, way.shares)
    first, *others = processes(way.ranks).run(trained, name, method, loop, dtype)
    assert_close(first, expected, PART[dtype])
    for other in others:
        assert_same_state(other, first)


def needs_other_optimizer(method, loop):
    """Adam's second moment is what Adam has."""
    return method == "ewc optimizer" and "adam" not in loop and loop != "attached"


@pytest.mark.parametrize("loop", ["by hand", "attached", "fused sgd", "fused adam"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SMALL)
def test_every_method(processes, name, method, loop):
    if not needs_other_optimizer(method, loop):
        check(processes, name, method, loop, torch.float64)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("method", ["si", "ewc empirical"])
@pytest.mark.parametrize("name", SMALL)
def test_every_loop_in_single_precision(processes, name, method, loop):
    check(processes, name, method, loop, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["by hand", "fused adamw"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LARGE)
def test_two_dimensions_of_processes(processes, name, method, loop):
    if not needs_other_optimizer(method, loop):
        check(processes, name, method, loop, torch.float64)
