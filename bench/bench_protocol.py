"""The whole course protocol for one method: `clext.train` against a notebook's loop, in one run.

    python bench/bench_protocol.py --tasks 5 --epochs 1       # recorded to results/protocol.jsonl
    python bench/bench_protocol.py ewc --epochs 10 --no-course --device cuda
    pytest bench/bench_protocol.py -s                         # small: 2 tasks of 1 epoch

Seconds are those of training, evaluation after every epoch and the end of each task, without
reading files into memory. MNIST is looked for in $CLEXT_DATA and the cache folder.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch

import clext
from clext.data.datasets import whereabouts
from course.course_loop import COURSE_METHODS, course_protocol
from speed.timing import machine, record

METHODS = ("ewc", "si")
PRECISIONS = ("fp32", "bf16")
TASKS = int(os.environ.get("CLEXT_BENCH_TASKS", "2"))
EPOCHS = int(os.environ.get("CLEXT_BENCH_EPOCHS", "1"))
# How many times faster train() is to be than the notebook's loop, on two CPU cores in fp32.
TARGET = 2.5

Entry = dict[str, Any]


def problem(*, course: bool) -> str | None:
    """Why the protocol cannot be run here, or None."""
    if whereabouts()["mnist"].startswith("not found"):
        return "MNIST was found neither in $CLEXT_DATA nor in the cache folder"
    if not course:
        return None
    if not (mnist_root() / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        return "torchvision reads MNIST only from unpacked files in a folder MNIST/raw"
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # beside another torch than its own it fails in many ways
        return f"torchvision cannot be imported ({error})"
    return None


def mnist_root() -> Path:
    """What torchvision takes as the root of the files that clext has found."""
    return Path(whereabouts()["mnist"].rpartition(" (")[0]).parent.parent


def compare(
    method: str,
    precisions: tuple[str, ...],
    tasks: int,
    epochs: int,
    device: str,
    *,
    course: bool,
) -> list[Entry]:
    """An entry for each precision of `clext.train`; the notebook's loop is in fp32 and run once."""
    course_seconds = 0.0
    course_final: list[float] = []
    if course:
        course_seconds, course_final = course_protocol(method, mnist_root(), tasks, epochs, device)
    entries = []
    for precision in precisions:
        result = clext.train(
            method,
            dataset="mnist",
            tasks=tasks,
            epochs=epochs,
            device=device,
            precision=precision,
            progress=False,
        )
        final = [float(a) for a in result.accuracy[-1]]
        entries.append(
            {
                "method": method,
                "tasks": tasks,
                "epochs": epochs,
                "precision": precision,
                "seconds": {
                    "clext": round(result.seconds, 2),
                    **{name: round(s, 2) for name, s in result.timings.items()},
                    **({"course": round(course_seconds, 2)} if course_seconds else {}),
                },
                "accuracy": {
                    "clext": [round(a, 4) for a in final],
                    "course": [round(a, 4) for a in course_final],
                },
                "ratio": round(course_seconds / result.seconds, 2) if course_seconds else None,
                "target": TARGET,
                "machine": machine(device),
            }
        )
    return entries


def described(entry: Entry) -> str:
    seconds, accuracy = entry["seconds"], entry["accuracy"]
    text = (
        f"{entry['method']} {entry['precision']}, {entry['tasks']} tasks of {entry['epochs']} "
        f"epochs: clext {seconds['clext']:.1f} s (average accuracy {mean(accuracy['clext']):.4f})"
    )
    if entry["ratio"] is None:
        return text
    return (
        f"{text}, course loop {seconds['course']:.1f} s ({mean(accuracy['course']):.4f}): "
        f"{entry['ratio']:.2f}x (target {entry['target']:g}x in fp32 on 2 cores)"
    )


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


@pytest.mark.parametrize("method", METHODS)
def test_protocol(method: str, capsys: Any) -> None:
    reason = problem(course=True)
    if reason:
        pytest.skip(reason)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for entry in compare(method, PRECISIONS, TASKS, EPOCHS, device, course=True):
        # The same job is done: each learns the task that it has just seen.
        assert entry["accuracy"]["clext"][-1] > 0.85
        assert entry["accuracy"]["course"][-1] > 0.85
        with capsys.disabled():
            print(f"\n{described(entry)}")


@click.command(help=(__doc__ or "").replace("\n\n    ", "\n\n\b\n    ", 1))
@click.argument("methods", nargs=-1, type=click.Choice([*clext.METHODS]))
@click.option("--tasks", default=5, show_default=True)
@click.option("--epochs", default=1, show_default=True)
@click.option(
    "--precision", "precisions", multiple=True, default=PRECISIONS, type=click.Choice(PRECISIONS)
)
@click.option("--device", default="cpu", show_default=True)
@click.option("--course/--no-course", default=True, help="Run the notebook's loop too.")
@click.option("--seeds", default=0, help="Also time as many runs, on CUDA beside each other.")
def protocol(
    methods: tuple[str, ...],
    tasks: int,
    epochs: int,
    precisions: tuple[str, ...],
    device: str,
    course: bool,
    seeds: int,
) -> None:
    chosen = methods or METHODS
    reason = problem(course=course)
    if course and (missing := sorted({*chosen} - {*COURSE_METHODS})):
        reason = f"the notebook's loop has no {', '.join(missing)}; add --no-course"
    if reason:
        raise SystemExit(f"nothing was run: {reason}")
    for method in chosen:
        for entry in compare(method, precisions, tasks, epochs, device, course=course):
            record("protocol", entry)
            print(described(entry), flush=True)
        for precision in precisions if seeds else ():
            start = time.perf_counter()
            clext.train(
                method,
                seeds=range(seeds),
                dataset="mnist",
                tasks=tasks,
                epochs=epochs,
                device=device,
                precision=precision,
                progress=False,
            )
            seconds = time.perf_counter() - start
            print(
                f"{method} {precision}, {tasks} tasks of {epochs} epochs, {seeds} seeds: "
                f"clext {seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    protocol()
