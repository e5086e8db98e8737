"""A sweep that is killed ten times, and continued, is the one that was never interrupted."""

import multiprocessing
import os
import random
import time

import numpy as np
import pytest

import clext

SWEEP = {"methods": "ewc, si", "strengths": [10, 1000], "seeds": range(5), "threads": 1}
PLAN = {**SWEEP, "dataset": "digits", "tasks": 2, "epochs": 1, "progress": False}


def progress(folder):
    """When the plan was written, and how many results there are."""
    plan = folder / "sweep.json"
    # Folders in which something is written come and go: os.walk does not mind.
    results = sum("result.json" in files for _, _, files in os.walk(folder))
    return plan.stat().st_mtime_ns if plan.exists() else 0, results


@pytest.mark.slow
def test_killed_at_ten_random_times_it_ends_with_the_same_table(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    # Once for all ten, whatever a run imports.
    processes.set_forkserver_preload(["clext.training.sweep", "sklearn.datasets", "torch._dynamo"])
    whole, killed, moments = tmp_path / "whole", tmp_path / "killed", random.Random(20)
    expected = clext.sweep(out=whole, **PLAN)
    shortest = min(result.seconds for result in expected.results.values())
    for _ in range(10):
        begin = progress(killed)
        more = moments.randrange(2)
        process = processes.Process(target=clext.sweep, kwargs={"out": killed, **PLAN})
        process.start()
        while (now := progress(killed))[0] == begin[0] or now[1] < begin[1] + more:
            assert process.is_alive()
            time.sleep(0.01)
        time.sleep(moments.uniform(0, shortest))
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
