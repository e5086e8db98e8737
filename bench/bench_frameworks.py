"""Two tasks with EWC in each framework: lines of glue, the loop by hand, and time of a step.

A step is far longer than what a method adds to it, and the spells of a busy machine are longer
still: time is the process's own, and that of the fastest step.
"""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from speed.framework_case import Framework
from speed.framework_images import IMAGES
from speed.framework_texts import TEXTS
from speed.timing import ROUNDS, machine, record

FRAMEWORKS = {**IMAGES, **TEXTS}


@contextmanager
def stamps():
    """The process's time at the end of each step of any optimizer."""
    found: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: found.append(time.process_time()))
    try:
        yield found
    finally:
        handle.remove()


def trained(case: Framework, training: Any) -> tuple[list[torch.Tensor], float]:
    """The parameters that come out, and the seconds of the fastest step of the second task."""
    model, tasks = case.model(), case.tasks()
    with stamps() as ends:
        training(model, tasks)
    second = ends[len(ends) // 2 :]
    seconds = min(after - before for before, after in itertools.pairwise(second))
    return [entry.detach().clone() for entry in model.parameters()], seconds


def largest_difference(some: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, other, strict=True))


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_framework(name: str, capsys: Any, monkeypatch: Any, tmp_path: Any) -> None:
    case = FRAMEWORKS[name]
    pytest.importorskip(case.package)
    monkeypatch.chdir(tmp_path)
    by_hand, _ = trained(case, case.by_hand)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(ROUNDS or 5):
        without, first = trained(case, case.without)
        glued, second = trained(case, case.glued)
        seconds["without"].append(first)
        seconds["with"].append(second)
    difference = largest_difference(glued, by_hand)
    assert difference < 1e-6
    assert largest_difference(glued, without) > 1e-4  # the method had its part
    entry = {
        "framework": name,
        "parameters": sum(entry.numel() for entry in glued),
        "glue": case.glue,
        "difference": difference,
        "ms": {key: round(1e3 * min(values), 3) for key, values in seconds.items()},
        "machine": machine("cpu"),
    }
    record("frameworks", entry)
    with capsys.disabled():
        print(f"\n{name}: {len(case.glue)} lines, {difference:.1e}, {entry['ms']}")
