"""EWC and SI on the same two tasks by clext, Avalanche, Mammoth, a course's notebook and by hand.

    python bench/others/compare.py                     # CLEXT_DATA: a folder with MNIST/raw
    python bench/others/compare.py --mammoth FOLDER    # and a checkout of Mammoth
    python bench/others/compare.py --search            # strengths on seed 0; nothing is recorded

Each contestant runs in a process of its own, in turns, on one thread; each round has another seed.
Seconds are the processor's, of a process and its children: a busy machine adds little to them.
Recorded to results/others.jsonl.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from setting import BATCH, EPOCHS, IMAGES, LR, TASKS, raw
from speed.timing import machine, record

HERE = Path(__file__).resolve().parent
# The strengths that are tried on seed 0. The loop by hand and `clext.train` have the convention of
# clext's loop, and so has Mammoth's EWC: they take what is best there.
TRIED = {
    "with_clext_loop": {"ewc": (10, 100, 1000), "si": (1, 10, 100)},
    "with_avalanche": {"ewc": (1000, 10_000, 100_000), "si": (1000, 10_000, 100_000)},
    "course_notebook": {"ewc": (1000, 10_000, 100_000), "si": (1, 10, 100)},
    "mammoth": {"si": (1, 10, 100)},
}
BEST = {
    "by_hand": {"ewc": 100, "si": 10},
    "with_clext_loop": {"ewc": 100, "si": 10},
    "with_clext_train": {"ewc": 100, "si": 10},
    "with_avalanche": {"ewc": 10_000, "si": 1000},
    "course_notebook": {"ewc": 10_000, "si": 10},
    "mammoth": {"ewc": 100, "si": 10},
}
# OMP_THREAD_LIMIT, since Mammoth asks for two threads whatever OMP_NUM_THREADS says.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_THREAD_LIMIT": "1"}


def lines_of(script: Path) -> int:
    """Lines that are neither blank nor comments nor docstrings of one line."""
    lines = (line.strip() for line in script.read_text().splitlines())
    return sum(bool(line) and not line.startswith(("#", '"""')) for line in lines)


def small_mnist(folder: Path) -> None:
    """MNIST's files with the first images alone, where Mammoth looks for them."""
    for name in ("MNIST", "MyMNIST"):
        target = folder / "MNIST" / name / "raw"
        target.mkdir(parents=True)
        for file in raw().glob("*-ubyte"):
            content = file.read_bytes()
            if file.name.startswith("train"):
                head, item = (16, 784) if "images" in file.name else (8, 1)
                count = IMAGES.to_bytes(4, "big")
                content = content[:4] + count + content[8 : head + IMAGES * item]
            (target / file.name).write_bytes(content)


def mammoth_command(method: str, strength: float, seed: int, data: Path) -> list[str]:
    options = f"--dataset perm-mnist --stop_after {TASKS} --mlp_hidden_size 256 --n_epochs {EPOCHS}"
    options += f" --batch_size {BATCH} --optimizer adam --lr {LR} --seed {seed} --num_workers 0"
    options += f" --base_path {data}/ --non_verbose 1"
    of_method = {
        "ewc": f"--model ewc_on --gamma 1 --e_lambda {strength}",
        "si": f"--model si --xi 0.1 --c {strength}",
    }
    return ["main.py", *options.split(), *of_method[method].split()]


def run(command: list[str], folder: Path) -> tuple[str, float]:
    """What a Python process prints, and the seconds of the processor that it takes."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=ONE_THREAD, text=True, capture_output=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {done.stderr}")
    after = os.times()
    used = after.children_user + after.children_system
    return done.stdout, used - before.children_user - before.children_system


def measured(name: str, method: str, strength: float, seed: int, mammoth: Path | None) -> Any:
    """Accuracy after the last task, seconds of training (None if unknown) and of the process."""
    if name == "mammoth":
        assert mammoth is not None
        with tempfile.TemporaryDirectory() as data:
            small_mnist(Path(data))
            command = mammoth_command(method, strength, seed, Path(data))
            text, whole = run(command, mammoth)
        percents = re.findall(r"Raw accuracy values: Domain-IL \[(.*)\]", text)[-1]
        return fmean(map(float, percents.split(","))) / 100, None, whole
    text, whole = run([str(HERE / f"{name}.py"), method, str(strength), str(seed)], HERE)
    found = json.loads(text.splitlines()[-1])
    return fmean(found["accuracies"]), found["seconds"], whole


def contestants(mammoth: Path | None) -> list[tuple[str, str]]:
    names = [name for name in BEST if mammoth or name != "mammoth"]
    return [(name, method) for method in ("ewc", "si") for name in names]


def search(mammoth: Path | None) -> None:
    for name, method in contestants(mammoth):
        for strength in TRIED.get(name, {}).get(method, ()):
            accuracy, *_ = measured(name, method, strength, 0, mammoth)
            print(f"{name} {method} {strength}: {accuracy:.4f}", flush=True)


def compare(mammoth: Path | None, rounds: int) -> None:
    for seed in range(1, rounds + 1):
        for name, method in contestants(mammoth):
            strength, script = BEST[name][method], HERE / f"{name}.py"
            accuracy, training, whole = measured(name, method, strength, seed, mammoth)
            entry = {
                "contestant": name,
                "method": method,
                "seed": seed,
                "strength": strength,
                "lines": lines_of(script) if script.exists() else None,
                "accuracy": round(accuracy, 4),
                "training": None if training is None else round(training, 2),
                "process": round(whole, 2),
                "machine": {**machine("cpu"), "threads": 1},
            }
            record("others", entry)
            print(
                f"{name} {method} {seed}: {accuracy:.4f}, {training} s, {whole:.1f} s", flush=True
            )


@click.command(help=__doc__)
@click.option("--mammoth", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--rounds", default=3, show_default=True, help="Seeds 1, 2, ...")
@click.option("--search", "searches", is_flag=True, help="Try strengths on seed 0.")
def main(mammoth: Path | None, rounds: int, searches: bool) -> None:
    if searches:
        search(mammoth)
    else:
        compare(mammoth, rounds)


if __name__ == "__main__":
    main()
