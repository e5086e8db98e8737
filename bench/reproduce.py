"""Published numbers again: `python bench/reproduce.py NAME [--row ROW] [--seed N]`.

NAME is a table of bench/published.py. Each row is trained by the protocol of its authors; the
result is printed beside the published value and appended to bench/results/published.jsonl, which
`python bench/report.py` turns into a table. MNIST has to be there, see `clext info`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from statistics import fmean

import click
import torch
from published import PROTOCOLS, Protocol, Row, verdict
from timing import machine, record

from clext.data import DataError, Dataset, load_dataset
from clext.evaluation import Examiner
from clext.module_mode import module_mode
from clext.scenarios import make_scenario
from clext.scenarios.scenario import as_it_is
from clext.seeding import Seeds, generator, isolated_rng
from clext.settings import resolve_device
from clext.steps import TaskSteps


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(PROTOCOLS)))
@click.option("--row", "rows", multiple=True, help="Only this row; may be given several times.")
@click.option(
    "--seed", "seeds", multiple=True, type=click.IntRange(0), default=[0], show_default=True
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda if there is one]")
def reproduce(name: str, rows: tuple[str, ...], seeds: tuple[int, ...], device: str | None) -> None:
    protocol = PROTOCOLS[name]
    known = [row.name for row in protocol.rows]
    if unknown := [row for row in rows if row not in known]:
        raise click.BadParameter(f"{unknown[0]!r}; {name} has {', '.join(map(repr, known))}")
    try:
        target = resolve_device(device)
        data = load_dataset("mnist", None, show=True)
    except (ValueError, DataError) as error:
        raise click.ClickException(str(error)) from error
    print(f"{protocol.title}: {protocol.source}")
    print(f"Tolerance: {protocol.tolerance}")
    for seed in seeds:
        for row in protocol.rows:
            if not rows or row.name in rows:
                run(name, protocol, row, data, seed, target)


def run(
    name: str, protocol: Protocol, row: Row, data: Dataset, seed: int, device: torch.device
) -> None:
    """Train one row and record what came out."""
    if row.note:
        print(f"{row.name}: {row.note}")
    start = time.perf_counter()
    curve = learn(protocol, row, data, seed, device)
    seconds = time.perf_counter() - start
    got = 100 * curve[-1]
    published = f"; published {row.published:g}: {verdict(row, got)}" if row.published else ""
    print(f"{row.name}: {got:.2f}{published} ({seconds / 60:.0f} min)", flush=True)
    record(
        "published",
        {
            "name": name,
            "row": row.name,
            "seed": seed,
            "seeds": asdict(Seeds.derive(seed)),
            "accuracy": round(got, 2),
            "after_each_task": [round(100 * value, 2) for value in curve],
            "seconds": round(seconds),
            "machine": machine(device.type),
        },
    )


def learn(
    protocol: Protocol, row: Row, data: Dataset, seed: int, device: torch.device
) -> list[float]:
    """The average accuracy over the tasks seen, after each task."""
    seeds = Seeds.derive(seed)
    train, test = (split.to(device, torch.float32) for split in protocol.prepare(data))
    features = train.inputs.shape[1]
    with isolated_rng(seeds.model, device):
        model = protocol.model(features, data.num_classes).to(device)
    method = row.method(model)
    optimizer = row.optimizer(method)
    shuffle = generator(seeds.shuffle)
    prepared = replace(data, train=train, test=test)
    scenario = make_scenario("permuted", prepared, protocol.tasks, seeds.scenario)
    if not protocol.first_is_permuted:
        first = replace(scenario.tasks[0], transform=as_it_is)
        scenario = replace(scenario, tasks=[first, *scenario.tasks[1:]])
    examiner = Examiner(method, scenario)
    curve: list[float] = []
    for k, task in enumerate(scenario.tasks, start=1):
        split = task.train()
        if not protocol.keep_optimizer:
            optimizer = row.optimizer(method)
        steps = TaskSteps(method, optimizer, tuple(split), protocol.batch_size, "fp32")
        with module_mode(model, training=True):
            for rows in protocol.order(len(split.labels), shuffle):
                steps.take(rows.to(device))
        curve.append(fmean(examiner.accuracies(k - 1)))
        print(f"  {row.name}, seed {seed}: task {k}, average {100 * curve[-1]:.2f}", flush=True)
        if k < protocol.tasks:
            method.consolidate(row.importance_data(model, split))
    return curve


if __name__ == "__main__":
    reproduce()
