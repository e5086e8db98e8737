"""The processes that the other tests run in: answers, errors, overruns and deaths."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from processes import Failure, ProcessError, Processes


@pytest.fixture(scope="module")
def two():
    made = Processes(2, group_timeout=3)
    yield made
    made.close()


def summed(value):
    total = torch.tensor([value + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), os.getpid(), total


def failing(rank):
    if dist.get_rank() == rank:
        raise KeyError("what this rank lacks")
    summed(0.0)


def sleeping():
    if dist.get_rank() == 1:
        time.sleep(60)


def dying():
    if dist.get_rank() == 1:
        os._exit(7)
    summed(0.0)


def alone():
    if dist.get_rank() == 1:
        dist.all_reduce(torch.zeros(1))


def seconds_of(call):
    start = time.monotonic()
    call()
    return time.monotonic() - start


def test_each_rank_answers_and_the_processes_stay(two):
    (first, one, total), (second, other, _) = two.run(summed, 1.0)
    assert (first, second, float(total)) == (0, 1, 3.0)
    assert [pid for _, pid, _ in two.run(summed, 2.0)] == [one, other]


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_names_the_rank_with_its_traceback_and_waits_for_no_other(two, rank):
    def call():
        with pytest.raises(ProcessError, match=f"rank {rank} of 2: Traceback") as error:
            two.run(failing, rank)
        assert "what this rank lacks" in str(error.value)

    two.run(summed, 1.0)
    assert seconds_of(call) < 10
    assert len(two.run(summed, 1.0)) == 2


def test_an_overrun_ends_with_where_the_process_was(two):
    def call():
        with pytest.raises(ProcessError, match=r"(?s)rank 1 of 2: no answer in time.*in sleeping"):
            two.run(sleeping, limit=2)

    two.run(summed, 1.0)
    assert seconds_of(call) < 10
    assert len(two.run(summed, 1.0)) == 2


def test_a_death_is_named_and_the_other_ends_with_an_error_of_the_group(two):
    two.run(summed, 1.0)
    survivor, dead = two.answers(dying, limit=20)
    assert dead == Failure("it ended with exit code 7")
    assert "Error" in survivor.text
    assert "no answer" not in survivor.text
    assert len(two.run(summed, 1.0)) == 2


def test_a_collective_that_others_do_not_join_is_an_error_of_its_call(two):
    with pytest.raises(ProcessError):
        two.run(alone)
