"""Two tasks with EWC in each framework: lines of glue, the loop by hand, and time of a step.

Time is that of the process: a step is far longer than what a method adds to it, and the spells of a
busy machine would be longer still.
"""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager
from statistics import median
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
    """The parameters that come out, and the median seconds of a step of the second task."""
    model, tasks = case.model(), case.tasks()
    with stamps() as ends:
        training(model, tasks)
    second = ends[len(ends) // 2 :]
    seconds = median(after - before for before, after in itertools.pairwise(second))
    return [entry.detach().clone() for entry in model.parameters()], seconds


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_framework(name: str, capsys: Any, monkeypatch: Any, tmp_path: Any) -> None:
    case = FRAMEWORKS[name]
    pytest.importorskip(case.package)
    monkeypatch.chdir(tmp_path)
    by_hand, _ = trained(case, case.by_hand)
    glued, _ = trained(case, case.glued)
    difference = max(float((a - b).abs().max()) for a, b in zip(glued, by_hand, strict=True))
    assert difference < 1e-6
    pairs = [
        [trained(case, training)[1] for training in (case.without, case.glued)]
        for _ in range(ROUNDS or 5)
    ]
    entry = {
        "framework": name,
        "parameters": sum(entry.numel() for entry in glued),
        "glue": case.glue,
        "difference": difference,
        "ms": {
            "without": round(1e3 * median(pair[0] for pair in pairs), 3),
            "with": round(1e3 * median(pair[1] for pair in pairs), 3),
        },
        "overhead_ms": round(1e3 * median(b - a for a, b in pairs), 3),
        "machine": machine("cpu"),
    }
    record("frameworks", entry)
    with capsys.disabled():
        print(f"\n{name}: {len(case.glue)} lines, {difference:.1e}, {entry['ms']}")
