"""Accuracy by the bytes kept, of DER's table: `python bench/report/kept_picture.py`.

Draws bench/results/accuracy_by_bytes.png from bench/results/published.jsonl.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean, stdev

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from report.accuracy_tables import accuracies, kept_bytes
from report.result_tables import RESULTS

MARKERS = "osD^vP*X<>hp"


def draw(path: Path) -> None:
    """A line for each method, through its memories; a mark alone where there is nothing to set."""
    lines: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
    for row, found, size in kept_bytes():
        if size > 0:
            lines[row.name.partition(",")[0]].append((size, accuracies(found)))
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    for marker, (name, points) in zip(MARKERS, lines.items(), strict=False):
        sizes = [size / 1e6 for size, _ in points]
        means = [fmean(values) for _, values in points]
        spread = [stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        axes.errorbar(sizes, means, spread, marker=marker, capsize=3, label=name)
    axes.set(
        xscale="log",
        xlabel="kept for later tasks, MB (images as float32)",
        ylabel="average accuracy of 20 tasks, %",
        title="Permuted MNIST, 20 tasks in one epoch each",
    )
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    draw(RESULTS / "accuracy_by_bytes.png")
