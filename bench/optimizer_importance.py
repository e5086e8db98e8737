"""EWC by Adam's second moment beside the empirical Fisher: `python bench/optimizer_importance.py`.

Permuted MNIST, three tasks of one epoch each, a small perceptron, several strengths and seeds: for
each run a line in bench/results/optimizer_importance.jsonl, and for each seed one with what the two
importances of the first task have to do with each other. About five minutes on one core.
"""

from __future__ import annotations

import time

import click
import torch
from torch import Tensor, nn

import clext
from clext.data.datasets import Batches
from clext.importance import fisher_information
from clext.training.runs import load_scenario
from clext.training.settings import Settings
from speed.timing import machine, record

BATCH = 128
STRENGTHS = [5.0, 25.0, 100.0, 250.0, 1000.0]
KINDS = {"empirical": 1, "optimizer": BATCH}  # by what strengths are multiplied


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first, second = nn.Linear(784, 256), nn.Linear(256, 256)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(256, 10))


def train(method: clext.Method, seed: int, tasks: int) -> clext.Result:
    return clext.train(
        method,
        dataset="mnist",
        tasks=tasks,
        epochs=1,
        batch_size=BATCH,
        lr=1e-3,
        seed=seed,
        device="cpu",
        progress=False,
    )


def run(fisher: str | None, strength: float, seed: int) -> None:
    """Learn three tasks; without `fisher` by plain fine-tuning."""
    model = make_model(seed)
    if fisher is None:
        method: clext.Method = clext.Baseline(model)
    else:
        method = clext.EWC(model, fisher=fisher, strength=strength * KINDS[fisher])
    result = train(method, seed, tasks=3)
    entry = {
        "fisher": fisher,
        "strength": strength * KINDS.get(fisher or "", 1),
        "seed": seed,
        "average_accuracy": result.average_accuracy[-1],
        "lowest_accuracy": float(result.accuracy[-1].min()),
        "learning_accuracy": float(result.learning_accuracy),
        "consolidate_seconds": result.timings["consolidation"] / 3,
        "machine": machine("cpu"),
    }
    record("optimizer_importance", entry)
    print(fisher, entry["strength"], seed, f"{entry['average_accuracy']:.4f}", flush=True)


def compare(seed: int) -> None:
    """Both importances after the first task, where no pull has been in the gradients."""
    method = clext.EWC(make_model(seed), fisher="optimizer")
    train(method, seed, tasks=1)
    moment = flat(method.importance.values())
    data = load_scenario(Settings(dataset="mnist", tasks=1, seed=seed)).tasks[0].train()
    start = time.perf_counter()
    fisher = flat(
        fisher_information(method.model, list(method.model.parameters()), Batches(data, BATCH))
    )
    entry = {
        "comparison": "first task",
        "seed": seed,
        "correlation": float(torch.corrcoef(torch.stack([moment, fisher]))[0, 1]),
        "rank_correlation": float(
            torch.corrcoef(torch.stack([ranks(moment), ranks(fisher)]))[0, 1]
        ),
        "fisher_by_moment": float(fisher.sum() / moment.sum()),
        "fisher_seconds": time.perf_counter() - start,
        "machine": machine("cpu"),
    }
    record("optimizer_importance", entry)
    print({key: value for key, value in entry.items() if key != "machine"}, flush=True)


def flat(entries) -> Tensor:
    return torch.cat([entry.flatten() for entry in entries]).double()


def correlation(left: Tensor, right: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Places in the order of size; equal values (pixels that are always 0) share theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts + 1) / 2)[inverse]


@click.command(help=__doc__)
@click.option("--seed", "seeds", multiple=True, type=int, default=[0, 1, 2], show_default=True)
def main(seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        compare(seed)
        run(None, 0.0, seed)
        for fisher in KINDS:
            for strength in STRENGTHS:
                run(fisher, strength, seed)


if __name__ == "__main__":
    main()
