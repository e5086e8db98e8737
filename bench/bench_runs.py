"""Whole runs: an epoch of ResNet-18 with crops and flips by `clext.train`, by a plain loop and by
Avalanche; and an epoch on a data loader with workers, beside the loop over the same loader.

The images are noise, which costs what images cost. Time is the process's own (that of a loader's
workers is not in it), and that of the fastest step: a busy machine makes the others.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from statistics import median
from time import process_time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, Dataset

import clext
from clext.training.augmentation import crop_flip
from clext.training.models import named_model
from speed.timing import ROUNDS, machine, record

IMAGES, BATCH, LR = 256, 32, 0.05


class Noise(Dataset):
    """Images [3, 32, 32] in [0, 1] and ten classes; or rows of 784."""

    def __init__(self, count: int, shape: tuple[int, ...], transform: Any = None) -> None:
        random = torch.Generator().manual_seed(0)
        self.inputs = torch.rand(count, *shape, generator=random)
        self.targets = torch.arange(count) % 10
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.inputs[index]
        return image if self.transform is None else self.transform(image), int(self.targets[index])


@contextmanager
def ends_of_steps():
    found: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: found.append(process_time()))
    try:
        yield found
    finally:
        handle.remove()


def seconds_of(run: Any) -> list[float]:
    """Of each step but the first."""
    with ends_of_steps() as ends:
        run()
    return [after - before for before, after in itertools.pairwise(ends)]


def resnet() -> nn.Module:
    return named_model("resnet18", (3, 32, 32), 10, 0)


def plain() -> None:
    model = resnet().train()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    data = Noise(IMAGES, (3, 32, 32), crop_flip)
    for x, y in DataLoader(data, BATCH, shuffle=True):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_clext(method: str) -> None:
    data = Noise(IMAGES, (3, 32, 32))
    pair = (data.inputs, data.targets)
    few = (data.inputs[:10], data.targets[:10])
    clext.train(
        method,
        scenario=clext.Scenario.from_datasets([(pair, few)]),
        model=resnet(),
        transform="crop-flip",
        optimizer="sgd",
        momentum=0.9,
        lr=LR,
        epochs=1,
        batch_size=BATCH,
        progress=False,
    )


def avalanche() -> None:
    from avalanche.benchmarks import benchmark_from_datasets
    from avalanche.benchmarks.utils import as_classification_dataset
    from avalanche.training.supervised import Naive

    data = as_classification_dataset(Noise(IMAGES, (3, 32, 32), crop_flip))
    benchmark = benchmark_from_datasets(train=[data], test=[data])
    model = resnet()
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    options = {"criterion": nn.CrossEntropyLoss(), "evaluator": None}
    strategy = Naive(
        model=model, optimizer=optimizer, train_mb_size=BATCH, train_epochs=1, **options
    )
    strategy.train(benchmark.train_stream[0], num_workers=0)


def compared(name: str, contestants: dict[str, Any], rounds: int, capsys: Any) -> None:
    """Runs all in turns; the median over the rounds of what their fastest steps cost."""
    steps: dict[str, list[float]] = {entry: [] for entry in contestants}
    for _ in range(rounds):
        for entry, run in contestants.items():
            steps[entry].append(min(seconds_of(run)))
    base = next(iter(contestants))
    ratios = {
        entry: round(median(a / b for a, b in zip(found, steps[base], strict=True)), 3)
        for entry, found in steps.items()
    }
    milliseconds = {entry: round(1e3 * median(found), 2) for entry, found in steps.items()}
    line = {"run": name, "base": base, "ms": milliseconds, "ratio": ratios}
    record("runs", {**line, "machine": machine("cpu")})
    with capsys.disabled():
        print(f"\n{name}: {milliseconds} ms a step, over {base} {ratios}")


@pytest.mark.filterwarnings("ignore")
def test_resnet18(capsys: Any) -> None:
    pytest.importorskip("torchvision")
    contestants = {
        "plain loop": plain,
        "clext baseline": lambda: by_clext("baseline"),
        "clext si": lambda: by_clext("si"),
    }
    if __import__("importlib.util").util.find_spec("avalanche") is not None:
        contestants["avalanche"] = avalanche
    compared("resnet18, crop-flip", contestants, ROUNDS or 5, capsys)


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))


def rows(workers: int) -> DataLoader:
    return DataLoader(Noise(12_800, (784,)), 128, shuffle=True, num_workers=workers)


def plain_loader(workers: int) -> None:
    model = perceptron()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for x, y in rows(workers):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loader_by_clext(workers: int) -> None:
    few = DataLoader(Noise(10, (784,)), 10)
    scenario = clext.Scenario.from_loaders([(rows(workers), few)], classes=[range(10)])
    clext.train(
        "baseline", scenario=scenario, model=perceptron(), lr=1e-3, epochs=1, progress=False
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 1])
def test_loader(workers: int, capsys: Any) -> None:
    contestants = {
        "plain loop": lambda: plain_loader(workers),
        "clext": lambda: loader_by_clext(workers),
    }
    compared(f"loader, {workers} workers", contestants, ROUNDS or 7, capsys)
