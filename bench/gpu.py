"""Times of clext's kernels on a GPU, in about a minute; a plain script, without pytest-benchmark.

    python bench/gpu.py                              # a line of JSON for each case
    python bench/gpu.py --only "adam ewc"            # those whose names have all these words
    python bench/gpu.py --device cpu --only mlp      # whether it runs

Of fused steps, products and projection of gradients, and SCP's slices: microseconds of a call that
Python launches ("called"), of one in a CUDA graph ("graph") and of a copy that moves as many bytes
("copy"); "of_copy" is copy over graph. Of a training step of the course's MLP: launched by Python
and as a replay; and of several runs whose steps are in one graph. Buffers used in turns are
together several times the L2. Exit code 1 if a case failed; the others are run all the same.
"""

from __future__ import annotations

import argparse
import gc
import json
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from bench_projection import Problem
from bench_state_dtype import SAVED
from bench_step import STEPS, Run, random_images

from clext.training.graphs import GraphedSteps, StepsTogether, capture_graph
from clext.training.steps import TaskSteps
from speed.cases import CASES, Lists
from speed.sizes import MODELS, Shapes
from speed.steppers import METHOD_LISTS, Fused, least_traffic
from speed.timing import ROUNDS, Stopwatch, copies, in_turns, machine, sets_beyond_cache

SAMPLES = ROUNDS or 9
LARGE_COPY = 2**30
PAST_TASKS = 4
RUNS_TOGETHER = (1, 8, 32)
# Calls in a graph, at least: beside so many its own launch is short.
RECORDED = 20

Call = Callable[[], object]
Entry = dict[str, Any]


def cases(device: str) -> Iterator[tuple[str, Callable[[], Entry]]]:
    """Names, and what measures them."""
    yield "copy", lambda: kernel(LARGE_COPY, device, None)
    for model in ("mlp", "resnet18"):
        shapes = MODELS[model]()
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        for method in METHOD_LISTS:
            for dtype in (None,) if method == "none" else (None, torch.bfloat16):
                size = 4 * sum(least_traffic("adam", method)) - (SAVED if dtype else 0)
                make = partial(fused_step, method, shapes, device, dtype)
                name = f"adam {method} {model} state {'bf16' if dtype else 'fp32'}"
                yield name, partial(kernel, size * elements, device, make)
        for name, lists in (("gram", PAST_TASKS + 1), ("project", PAST_TASKS + 2)):
            make = partial(projection, name, shapes, device)
            yield f"{name} {model}", partial(kernel, 4 * lists * elements, device, make)
        size = CASES["sliced_importance_"].bytes_per_element
        make = partial(sliced, shapes, device)
        yield f"sliced {model}", partial(kernel, size * elements, device, make)
    for precision in ("fp32", "bf16"):
        for method in ("baseline", "ewc", "si", "rwalk"):
            yield f"train {method} mlp {precision}", partial(step, method, precision, device)
    for runs in RUNS_TOGETHER if device == "cuda" else ():
        yield f"train si mlp fp32 runs {runs}", partial(steps_together, runs, device)


def fused_step(method: str, shapes: Shapes, device: str, dtype: torch.dtype | None) -> Call:
    fused = Fused("adam", method, shapes, device, dtype)
    fused.step()  # makes the state; `launch` is what of a step can be recorded
    return fused.optimizer.launch  # type: ignore[attr-defined]


def projection(name: str, shapes: Shapes, device: str) -> Call:
    problem = Problem(shapes, PAST_TASKS, device)
    return problem.contestants()[name]


def sliced(shapes: Shapes, device: str) -> Call:
    case = CASES["sliced_importance_"]
    return case.contestants(Lists.make(shapes, device, case.state))["clext"]


def kernel(total_bytes: int, device: str, make: Callable[[], Call] | None) -> Entry:
    """Times of a call; `make` gives it on buffers of its own, and without it is a copy."""
    copied = copy_times(total_bytes, device)
    found = copied
    if make is not None:
        sets = sets_beyond_cache(total_bytes, device)
        found = times([make() for _ in range(sets)], device)
    own, copy = (entry.get("graph", entry["called"]) for entry in (found, copied))
    return {
        "us": {name: round(value, 2) for name, value in {**found, "copy": copy}.items()},
        "bytes": total_bytes,
        "gb_per_s": round(total_bytes / own / 1e3, 1),
        "of_copy": round(copy / own, 3),
    }


@cache
def copy_times(total_bytes: int, device: str) -> dict[str, float]:
    return times(copies(total_bytes, device), device)


def times(calls: list[Call], device: str) -> dict[str, float]:
    """Microseconds of one of the calls, by how they are launched."""
    watch, in_graph = Stopwatch(device), 1
    with torch.no_grad():
        watch.time("called", in_turns(calls), SAMPLES)
        if device == "cuda":
            calls = calls * -(-RECORDED // len(calls))
            in_graph = len(calls)
            replay = capture_graph(lambda: [call() for call in calls], torch.device(device))
            watch.time("graph", replay, SAMPLES)
    share = {"called": 1, "graph": in_graph}
    return {name: 1e6 * seconds / share[name] for name, seconds in watch.medians().items()}


def step(method: str, precision: str, device: str) -> Entry:
    """Times of a training step with the kernels of model and loss."""
    kinds: dict[str, type[TaskSteps] | None] = {"called": TaskSteps}
    if device == "cuda":
        kinds["graph"] = None  # as `clext.train` chooses
    split, watch = random_images(device), Stopwatch(device)
    for name, kind in kinds.items():
        run = Run(method, split, precision, kind)
        run.epoch()  # its first steps are recorded
        watch.time(name, run.epoch, SAMPLES)
    medians = watch.medians().items()
    return {"us": {name: round(1e6 * seconds / STEPS[device], 2) for name, seconds in medians}}


def steps_together(count: int, device: str) -> Entry:
    """Times of a step of so many runs, as `clext.train(seeds=...)` takes them on CUDA."""
    split, watch = random_images(device), Stopwatch(device)
    runs = [Run("si", split, "fp32", GraphedSteps) for _ in range(count)]
    together = StepsTogether([run.steps for run in runs])
    orders = [torch.randperm(len(split.labels)).to(device) for _ in range(count)]

    def epoch() -> None:
        together.train_on(orders, [lambda: None] * count)

    epoch()
    watch.time("graph", epoch, SAMPLES)
    us = 1e6 * watch.medians()["graph"] / STEPS[device]
    return {"us": {"graph": round(us, 2), "of_a_run": round(us / count, 2)}}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", help="words that a case's name has")
    given = parser.parse_args()
    # A step that cannot be recorded is launched, with a warning: here it is a failure.
    warnings.filterwarnings("error", message="clext: ")
    print(json.dumps({"machine": machine(given.device)}), flush=True)
    failed = 0
    for name, measure in cases(given.device):
        if not {*given.only.split()} <= {*name.split()}:
            continue
        try:
            entry = measure()
        except (RuntimeError, UserWarning) as error:
            entry = {"error": f"{error}".partition("\n")[0]}
            failed += 1
        print(json.dumps({"case": name, **entry}), flush=True)
        gc.collect()  # what one case has made is in the way of the next
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
