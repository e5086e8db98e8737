"""Published numbers again: `python bench/published/reproduce.py NAME [--row ROW] [--seed N]`.

NAME is a table of bench/published/tables.py. Each row is trained by the protocol of its authors;
the result is printed beside the published value and appended to bench/results/published.jsonl,
which `python bench/report/report.py` turns into a table. MNIST has to be there, see `clext info`.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import click
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from clext.core.modes import module_mode
from clext.core.seeding import Seeds, generator, isolated_rng
from clext.data.datasets import DataError, Dataset, load_dataset
from clext.data.scenario import make_scenario
from clext.data.task import identity
from clext.methods import Method
from clext.methods.parts.flat import REST
from clext.training.evaluate import Evaluator
from clext.training.machine import resolve_device
from clext.training.steps import TaskSteps
from clext.training.task import begin_task
from published.protocols import Protocol, Row, verdict, with_shuffled_classes
from published.tables import PROTOCOLS
from speed.timing import machine, record


@click.command(help=__doc__)
@click.argument("name", type=click.Choice(list(PROTOCOLS)))
@click.option("--row", "rows", multiple=True, help="Only this row; may be given several times.")
@click.option(
    "--seed", "seeds", multiple=True, type=click.IntRange(0), default=[0], show_default=True
)
@click.option(
    "--checkpoints",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the state of a row after each task; a row that has one there goes on from it.",
)
@click.option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda if there is one]")
def reproduce(
    name: str,
    rows: tuple[str, ...],
    seeds: tuple[int, ...],
    checkpoints: Path | None,
    device: str | None,
) -> None:
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
                run(name, protocol, row, data, seed, target, checkpoints)


def run(
    name: str,
    protocol: Protocol,
    row: Row,
    data: Dataset,
    seed: int,
    device: torch.device,
    folder: Path | None,
) -> None:
    """Train one row and record what came out."""
    if row.note:
        print(f"{row.name}: {row.note}")
    file = folder and folder / f"{name}-{slug(row.name)}-{seed}.pt"
    start = time.perf_counter()
    training = Training(protocol, row, data, seed, device)
    if file is not None and file.is_file():
        training.load(file)
        print(f"{row.name}: goes on after task {len(training.accuracies)}", flush=True)
    before = training.seconds
    while len(training.accuracies) < protocol.tasks:
        training.learn_task()
        training.seconds = before + time.perf_counter() - start
        latest = training.accuracies[-1]
        print(
            f"  {row.name}, seed {seed}: task {len(latest)}, average {100 * fmean(latest):.2f} "
            f"({' '.join(f'{100 * value:.1f}' for value in latest)})",
            flush=True,
        )
        if file is not None:
            training.save(file)
    curve, seconds = training.curve, training.seconds
    got = 100 * curve[-1]
    published = f"; published {row.published:g}: {verdict(row, got)}" if row.published else ""
    print(f"{row.name}: {got:.2f}{published} ({seconds / 60:.0f} min)", flush=True)
    record(
        "published",
        {
            "name": name,
            "row": row.name,
            "method": row.described,
            "seed": seed,
            "seeds": asdict(Seeds.derive(seed)),
            "accuracy": round(got, 2),
            "after_each_task": [round(100 * value, 2) for value in curve],
            "of_each_task": [round(100 * value, 2) for value in training.accuracies[-1]],
            "seconds": round(seconds),
            "kept_bytes": kept_bytes(training.method),
            "machine": machine(device.type),
        },
    )
    if file is not None:
        file.unlink()


def kept_bytes(method: Method) -> int:
    """What the method keeps for later tasks: the tensors of its state."""
    state = method.flat_state_dict()
    return sum(entry.nbytes for key, entry in state.items() if key != REST)


def slug(name: str) -> str:
    """The name of a row as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name)


class Training:
    """One row in training, task by task; between tasks it can be saved and loaded.

    `accuracies` holds, after each task, the accuracy of every task so far.
    """

    def __init__(
        self, protocol: Protocol, row: Row, data: Dataset, seed: int, device: torch.device
    ) -> None:
        self.protocol, self.row = protocol, row
        seeds = Seeds.derive(seed)
        train, test = protocol.prepare(data)
        prepared = replace(data, train=train, test=test)
        if protocol.shuffle_classes:
            prepared = with_shuffled_classes(prepared, seeds.scenario)
        self.scenario = make_scenario(
            protocol.scenario, prepared, protocol.tasks, seeds.scenario, row.incremental
        ).to(device, torch.float32)
        if not protocol.first_is_permuted:
            first = replace(self.scenario.tasks[0], transform=identity)
            self.scenario = replace(self.scenario, tasks=[first, *self.scenario.tasks[1:]])
        with isolated_rng(seeds.model, device):
            model = protocol.model(prepared.features, self.scenario.num_outputs).to(device)
        self.method = row.make_method(model, seeds.method)
        self.optimizer = row.optimizer(self.method)
        self.shuffle = generator(seeds.shuffle)
        self.accuracies: list[list[float]] = []
        self.seconds = 0.0

    @property
    def curve(self) -> list[float]:
        """Average accuracy over the tasks seen, after each task."""
        return [fmean(row) for row in self.accuracies]

    def learn_task(self) -> None:
        """Learn the next task, end it, and test all so far."""
        method, protocol, k = self.method, self.protocol, len(self.accuracies)
        own, examples = begin_task(method, self.scenario, k)
        if not protocol.keep_optimizer:
            self.optimizer = self.row.optimizer(method)
        steps = TaskSteps(method, self.optimizer, examples, protocol.batch_size, "fp32")
        with module_mode(method.model, training=True):
            only_shown = self.row.trains_last_alone and k + 1 < protocol.tasks
            order = () if only_shown else protocol.order(len(examples[0]), self.shuffle)
            for rows in order:
                steps.take(rows.to(steps.device))
        # Methods that predict by what they remember are tested with this task in the memory.
        method.consolidate(self.row.importance_data(method.model, own))
        self.accuracies.append(Evaluator(method, self.scenario).accuracies(k))

    def save(self, file: Path) -> None:
        """Keep what a later run needs to go on; replaces the file once it is written."""
        state = {
            "accuracies": self.accuracies,
            "seconds": self.seconds,
            "model": self.method.model.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "shuffle": self.shuffle.get_state(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        torch.save(state, part)
        part.replace(file)

    def load(self, file: Path) -> None:
        """Go on from what `save` has kept."""
        state = torch.load(file, weights_only=True)
        self.method.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        if self.protocol.keep_optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.shuffle.set_state(state["shuffle"])
        self.accuracies, self.seconds = state["accuracies"], state["seconds"]


if __name__ == "__main__":
    reproduce()
