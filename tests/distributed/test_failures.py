"""A process that dies or fails ends the others with an error; what cannot work is refused."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Failure, Processes
from sharded_models import WAYS, make_loader, make_network, make_steps, plain_parameters
from sharded_training import state_of
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from toy_training import assert_same_state

import clext

GROUP_TIMEOUT, LIMIT = 4.0, 60.0


@pytest.fixture
def impatient():
    made = Processes(2, GROUP_TIMEOUT)
    yield made
    made.close()


def batches_until_death(loader):
    for number, batch in enumerate(loader):
        if number == 2 and dist.get_rank() == 1:
            os._exit(7)
        yield batch


def dying_in_consolidate(name):
    way = WAYS[name]
    method = clext.EWC(way.wrap(make_network()))
    method.consolidate(batches_until_death(make_loader(0, way)))


def dying_in_a_step(name):
    way = WAYS[name]
    model = way.wrap(make_network())
    optimizer = clext.optim.Adam(model.parameters(), method=clext.SI(model), max_grad_norm=1.0)
    for x, y in batches_until_death(make_steps(0, way)):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "tp"])
@pytest.mark.parametrize("function", [dying_in_consolidate, dying_in_a_step])
def test_a_death_ends_the_others_with_an_error(impatient, function, name):
    start = time.monotonic()
    survivor, dead = impatient.answers(function, name, limit=LIMIT)
    assert dead == Failure("it ended with exit code 7")
    assert "Error" in survivor.text
    assert "no answer" not in survivor.text
    assert time.monotonic() - start < LIMIT


def failing_in_consolidate(name):
    """What is wrong with the data of one process is an error on both, and changes nothing."""
    way = WAYS[name]
    method = clext.EWC(way.wrap(make_network()))
    method.consolidate(make_loader(0, way))
    before = method.state_dict()
    batches = [(x, y) for x, y in make_loader(1, way)]
    if dist.get_rank() == 1:
        batches[1][0][0] = torch.nan
    with pytest.raises((ValueError, RuntimeError)) as error:
        method.consolidate(batches)
    assert_same_state(method.state_dict(), before)
    return str(error.value)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_data_that_is_wrong_on_one_process_is_an_error_on_all(impatient, name):
    answers = impatient.answers(failing_in_consolidate, name, limit=LIMIT)
    assert "nan" in str(answers[1]).lower() or "finite" in str(answers[1])
    assert not any(isinstance(answer, Failure) and "no answer" in answer.text for answer in answers)


# ---------------------------------------------------------------------- refusals


def sentence(make):
    """What the ValueError says that this ends with."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the tests look at what it says)
        make()
    return str(error.value)


def fsdp1(kind):
    model = FullyShardedDataParallel(make_network(), device_id=torch.device("cpu"))
    return sentence(lambda: kind(model))


@pytest.mark.parametrize("kind", [clext.EWC, clext.SI, clext.Replay])
def test_fsdp1_is_refused_when_the_method_is_made(processes, kind):
    for found in processes(2).run(fsdp1, kind):
        assert "fully_shard" in found
        assert found.count(". ") == 0


def test_zero3_is_refused_when_the_method_is_made():
    model = make_network()
    for number, entry in enumerate(model.parameters()):
        entry.ds_id = number  # as DeepSpeed marks the parameters that it has partitioned
    found = sentence(lambda: clext.EWC(model))
    assert "ZeRO-3" in found
    assert found.count(". ") == 0


def on_shards(kind):
    return sentence(lambda: kind(WAYS["fsdp"].wrap(make_network())))


@pytest.mark.parametrize("kind", [clext.LwF, clext.ICaRL, clext.DGR, clext.GEM, clext.AGEM])
def test_what_needs_a_copy_or_whole_gradients_is_refused_on_shards(processes, kind):
    for found in processes(2).run(on_shards, kind):
        assert kind.name in found
        assert found.count(". ") == 0


def made_before(is_before):
    """State of a method made before the model is sharded, or after."""
    way, model = WAYS["fsdp"], make_network()
    method = clext.SI(model) if is_before else None
    way.wrap(model)
    method = method or clext.SI(model)
    optimizer = clext.optim.Adam(model.parameters(), lr=0.02, method=method)
    for x, y in make_steps(0, way):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    method.consolidate()
    return {"parameters": plain_parameters(model), **state_of(method)}


def test_a_method_follows_a_model_that_is_sharded_after_it_was_made(processes):
    expected = processes(2).run(made_before, False)
    for found in processes(2).run(made_before, True):
        assert_same_state(found, expected[0])


def made_before_ddp():
    way = WAYS["ddp"]
    model = make_network()
    method = clext.EWC(model)
    DistributedDataParallel(model)
    method.consolidate(make_loader(0, way))
    return {"parameters": plain_parameters(model), **state_of(method)}


def test_a_method_made_before_ddp_measures_on_all_processes(processes):
    first, second = processes(2).run(made_before_ddp)
    assert_same_state(second, first)
