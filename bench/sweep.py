"""What other strengths give: `python bench/sweep.py [METHOD ...]`.

Permuted MNIST as in `clext.train`'s defaults (5 tasks, 10 epochs), one run for each strength.
Appends a line per run to bench/results/sweep.jsonl; `python bench/report/report.py` summarises.
"""

from __future__ import annotations

from typing import Any

import click

import clext
from clext.cli import parse_options
from speed.timing import machine, record

GRID: dict[str, list[float]] = {
    "baseline": [0.0],
    "ewc": [100.0, 250.0, 500.0],
    "mas": [0.025, 0.05, 0.1],
    "si": [10.0, 20.0, 40.0],
    "rwalk": [0.5, 1.0, 2.0],
    "scp": [50.0, 100.0, 200.0],
}


@click.command(help=__doc__)
@click.argument("methods", nargs=-1, type=click.Choice(list(GRID)))
@click.option("--strength", "strengths", multiple=True, type=float, help="Instead of the grid.")
@click.option("--epochs", default=10, show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=[0], show_default=True)
@click.option("--option", "options", multiple=True, metavar="NAME=VALUE", help="Of the method.")
def sweep(
    methods: tuple[str, ...],
    strengths: tuple[float, ...],
    epochs: int,
    seeds: tuple[int, ...],
    options: tuple[str, ...],
) -> None:
    extra = parse_options(options)
    for method in methods or GRID:
        for strength in strengths or GRID[method]:
            for seed in seeds:
                run(method, strength, epochs, seed, extra)


def run(method: str, strength: float, epochs: int, seed: int, options: dict[str, Any]) -> None:
    result = clext.train(
        method,
        dataset="mnist",
        strength=strength,
        epochs=epochs,
        seed=seed,
        progress=False,
        **options,
    )
    record(
        "sweep",
        {
            "method": method,
            "strength": strength,
            "options": result.config["method_options"],
            "tasks": result.config["tasks"],
            "epochs": epochs,
            "seed": seed,
            "average_accuracy": [round(a, 5) for a in result.average_accuracy],
            "forgetting": round(result.forgetting, 5),
            "seconds": round(result.seconds, 1),
            "machine": machine("cpu"),
        },
    )
    print(f"{method} {strength:g} {options or ''}: {result.average_accuracy[-1]:.4f}", flush=True)


if __name__ == "__main__":
    sweep()
