"""`pytest bench/bench_state_dtype.py -s`: anchor and importance in bfloat16 against float32.

The penalty, its gradient by hand, and fused steps. Both have the same numbers, rounded to bfloat16,
and must leave the same behind. Appended to bench/results/state_dtype.jsonl.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from speed.cases import CASES as OPS
from speed.cases import STRENGTH
from speed.sizes import MODELS, Shapes, on_devices
from speed.steppers import CLEXT_OPTIMIZERS, Fused, least_traffic
from speed.timing import DEVICES, Stopwatch, copy_contestant, machine, record, rounds_for

CASES = ("quadratic_penalty", "add_quadratic_penalty_grad_", "adam ewc", "sgd ewc", "adam si")
SAVED = 4  # bytes for each element: two lists that are only read


class Contestant:
    """One op or step over a model's parameters, in its second task."""

    def __init__(self, case: str, shapes: Shapes, device: str, dtype: torch.dtype | None) -> None:
        optimizer, _, method = case.partition(" ")
        is_step = optimizer in CLEXT_OPTIMIZERS
        fused = Fused(*((optimizer, method) if is_step else ("sgd", "ewc")), shapes, device, dtype)
        assert fused.method is not None
        self.model, self.method = fused.model, fused.method
        plan = self.method._state.plan  # type: ignore[attr-defined]
        self.run: Callable[[], Any] = {
            "quadratic_penalty": plan.quadratic_penalty,
            "add_quadratic_penalty_grad_": partial(plan.add_quadratic_penalty_grad_, STRENGTH),
        }.get(case, fused.step)

    def numbers(self) -> list[torch.Tensor]:
        params = list(self.model.parameters())
        return [*params, *(p.grad for p in params if p.grad is not None)]


def bytes_per_element(case: str) -> int:
    optimizer, _, method = case.partition(" ")
    if not method:
        return OPS[case].bytes_per_element
    return 4 * sum(least_traffic(optimizer, method))


def check_equal(full: Contestant, half: Contestant) -> None:
    for name in ("anchor", "importance"):
        setattr(full.method, name, getattr(half.method, name))
    values = [contestant.run() for contestant in (full, half)]
    if values[0] is not None:
        torch.testing.assert_close(*values)
    assert all(map(torch.equal, full.numbers(), half.numbers()))


@pytest.mark.parametrize(("model", "device"), on_devices(MODELS, DEVICES))
@pytest.mark.parametrize("case", CASES)
def test_state_dtype(case: str, model: str, device: str, benchmark: Any, capsys: Any) -> None:
    gc.collect()
    shapes = MODELS[model]()
    full = Contestant(case, shapes, device, None)
    half = Contestant(case, shapes, device, torch.bfloat16)
    check_equal(full, half)

    elements = sum(p.numel() for p in full.model.parameters())
    sizes = {"float32": bytes_per_element(case), "bfloat16": bytes_per_element(case) - SAVED}
    contestants = {"float32": full.run, "bfloat16": half.run}
    copies = {
        f"copy {name}": copy_contestant(size * elements, device) for name, size in sizes.items()
    }
    watch = Stopwatch(device)
    one_round = watch.round_of({**contestants, **copies})
    one_round()
    watch.seconds.clear()
    with torch.no_grad():
        benchmark.pedantic(half.run, setup=one_round, rounds=rounds_for(elements, device))

    seconds = watch.medians()
    entry = {
        "case": case,
        "model": model,
        "elements": elements,
        "bytes_per_element": sizes,
        "ms": {name: round(1e3 * seconds[name], 4) for name in sizes},
        "share_of_copy_bandwidth": {n: round(watch.ratio(f"copy {n}", n), 3) for n in sizes},
        "ratio": round(watch.ratio("float32", "bfloat16"), 3),
        "machine": machine(device),
    }
    benchmark.extra_info.update(entry)
    record("state_dtype", entry)
    with capsys.disabled():
        print(f"\n{case} {model} {device}: {entry['ms']} ms, ratio {entry['ratio']}")
