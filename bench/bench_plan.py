"""Host time of a call with many small tensors: handles held in C++ against lists of tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from clext import ops
from speed.cases import PATH, STRENGTH, Lists
from speed.timing import Stopwatch, machine, record

CALLS = 200


@pytest.mark.parametrize("tensors", [8, 100, 600])
def test_call_overhead(tensors: int, benchmark: Any, capsys: Any) -> None:
    shapes = [(16,)] * tensors
    lists = Lists.make(shapes, "cpu", ("anchor", "importance"))
    with_path = Lists.make(shapes, "cpu", PATH).plan_after_a_pull()
    plan = lists.plan()
    contestants = {
        "plan": partial(plan.add_quadratic_penalty_grad_, STRENGTH),
        "plan_keeps": partial(with_path.add_quadratic_penalty_grad_, STRENGTH),
        "plan_path": with_path.accumulate_path_integral_,
        "op": partial(
            ops.add_quadratic_penalty_grad_,
            lists.grads,
            lists.params,
            lists["anchor"],
            lists["importance"],
            STRENGTH,
        ),
    }
    watch = Stopwatch("cpu")

    def all_of_them() -> None:
        for name, contestant in contestants.items():
            watch.time(name, contestant, CALLS)

    with torch.no_grad():
        benchmark.pedantic(contestants["plan"], setup=all_of_them, rounds=20)

    micros = {name: round(1e6 * s, 2) for name, s in watch.medians().items()}
    entry = {"tensors": tensors, "us": micros, "machine": machine("cpu")}
    record("plan", entry)
    with capsys.disabled():
        print(f"\n{tensors} tensors, microseconds a call: {micros}")
