"""A sweep that is killed ten times, and continued, is the one that was never interrupted."""

import multiprocessing
import random
import time

import numpy as np
import pytest

import clext

SWEEP = {"methods": "ewc, si", "strengths": [10, 1000], "seeds": range(5), "threads": 1}
PLAN = {**SWEEP, "dataset": "digits", "tasks": 2, "epochs": 1, "progress": False}


@pytest.mark.slow
def test_killed_at_ten_random_times_it_ends_with_the_same_table(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["clext.training.sweep", "sklearn.datasets"])  # once for all
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(20)
    begin = time.perf_counter()
    expected = clext.sweep(out=whole, **PLAN)
    one = (time.perf_counter() - begin) / len(expected.runs)
    for _ in range(10):
        process = processes.Process(target=clext.sweep, kwargs={"out": killed, **PLAN})
        process.start()
        time.sleep(moments.uniform(0, 3) * one)
        assert process.is_alive()
        process.kill()
        process.join()
    there = clext.Sweep.load(killed)
    assert 0 < len(there.results) < len(expected.runs)
    continued = clext.sweep(out=killed, **PLAN)
    assert continued.table("csv") == expected.table("csv")
    for run, result in expected.results.items():
        assert np.array_equal(continued.results[run].accuracy, result.accuracy, equal_nan=True)
        assert continued.results[run].curve == result.curve
        if run in there.results:  # which was not run again
            assert continued.results[run].timings == there.results[run].timings
