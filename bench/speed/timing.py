"""Interleaved timing: every round runs every contestant, so that a busy machine hits all alike.

On the CPU calls are timed one by one. On CUDA events stand before and after as many calls as fill a
few milliseconds, without a wait between them: a call with a wait after it takes the time of the
wait, which is longer than most of what is measured here. What Python takes to launch the calls
still counts where the device is faster: `bench/gpu.py` times them in CUDA graphs too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import cycle
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from clext.ops._extension import build_info

RESULTS = Path(__file__).resolve().parents[1] / "results"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
ROUNDS = int(os.environ.get("CLEXT_BENCH_ROUNDS", "0"))
# Between two events on CUDA, whose clock ticks in half microseconds.
SPAN = 2e-3


def rounds_for(elements: int, device: str) -> int:
    """Enough for a stable median, few enough that the largest model takes well under a minute."""
    if ROUNDS:
        return ROUNDS
    return 30 if device == "cuda" or elements < 5e6 else 10


def copy_contestant(total_bytes: int, device: str) -> Callable[[], object]:
    """Moves the same number of bytes: half read, half written."""
    return in_turns(copies(total_bytes, device))


def copies(total_bytes: int, device: str) -> list[Callable[[], object]]:
    """Copies of as many bytes, each between buffers of its own."""

    def copy() -> Callable[[], object]:
        source = torch.rand(total_bytes // 8, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    return [copy() for _ in range(sets_beyond_cache(total_bytes, device))]


def sets_beyond_cache(total_bytes: int, device: str) -> int:
    """How many sets of buffers, used in turns, are four times a GPU's L2; 1 on the CPU."""
    if device != "cuda":
        return 1
    return ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / total_bytes)


def in_turns(functions: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """Calls another one of them each time, the first after the last."""
    turns = cycle(functions)
    return lambda: next(turns)()


def seconds_by_events(function: Callable[[], object], calls: int) -> float:
    """Seconds of one of many calls on the current CUDA device, waited for once at the end."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


class Stopwatch:
    """Seconds of a call, by contestant."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device == "cuda"
        self._calls: dict[str, int] = {}  # between two events
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, function: Callable[[], object], calls: int = 1) -> None:
        """Times `calls` calls after one that is not counted, which warms the caches.

        On CUDA each of them is as many as fill `SPAN`.
        """
        function()
        for _ in range(calls):
            self.seconds.setdefault(name, []).append(self._seconds_of(name, function))

    def _seconds_of(self, name: str, function: Callable[[], object]) -> float:
        if not self._on_cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        calls = self._calls.setdefault(name, 1)
        while (seconds := seconds_by_events(function, calls)) * calls < SPAN:
            calls *= 2
        self._calls[name] = calls
        return seconds

    def round_of(self, functions: Mapping[str, Callable[[], object]]) -> Callable[[], None]:
        """What times every function once, and begins with another one each time it is called."""
        turns = list(functions)

        def one_round() -> None:
            turns.append(turns.pop(0))
            for name in turns:
                self.time(name, functions[name])

        return one_round

    def medians(self) -> dict[str, float]:
        return {name: median(seconds) for name, seconds in self.seconds.items()}

    def ratio(self, name: str, base: str) -> float:
        """Median of `name` over `base`, each taken within one round: slow spells cancel out."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return median(seconds / reference for seconds, reference in pairs)


def machine(device: str) -> dict[str, object]:
    """Where and with what a result was made."""
    info = build_info()
    processor = _processor_name()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git_commit(),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": info["torch"],
        "clext": info["clext"],
        "cpu_path": info["cpu_path"],
        "openmp": info["openmp"],
    }


def record(file: str, entry: dict[str, Any]) -> None:
    """Appends one line to bench/results/<file>.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{file}.jsonl").open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


def _git_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
