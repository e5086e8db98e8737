"""What a process sends in a training step with a method, beside a step without one, and at the end
of a task: calls and bytes of collectives. Counts have no noise, so nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from collectives import CONTESTANTS, counted
from processes import Processes
from sharded_models import WAYS

from speed.timing import machine, record

WIDTH, HIDDEN = 256, 1024  # 1.05 million parameters


@pytest.fixture(scope="module")
def two() -> Iterator[Processes]:
    made = Processes(2)
    yield made
    made.close()


def totals(found: dict[str, Any]) -> dict[str, float]:
    return {"calls": sum(found["calls"].values()), "bytes": found["bytes"]}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_communication(name: str, two: Processes, capsys: Any) -> None:
    for contestant, (_, base) in CONTESTANTS.items():
        found, without = (
            two.run(counted, name, entry, WIDTH, HIDDEN)[0] for entry in (contestant, base)
        )
        step, expected = totals(found), totals(without)
        if "clipped" in base:  # both reduce a norm, clext's of one number
            assert step["calls"] <= expected["calls"]
            assert step["bytes"] <= expected["bytes"]
        else:
            assert step == expected
        entry = {
            "way": name,
            "ranks": WAYS[name].ranks,
            "training": contestant,
            "step": step,
            "without": expected,
            "end": totals(found["end"]),
            "machine": machine("cpu"),
        }
        record("communication", entry)
        with capsys.disabled():
            print(f"\n{name}, {contestant}: {step}, without {expected}, end {entry['end']}")
