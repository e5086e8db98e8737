"""What a published number was measured by: a protocol for its table, a row for its line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from clext.core.seeding import generator
from clext.data.datasets import Batches, Dataset, Split
from clext.methods import Method
from clext.optim import SGD, Adam

Order = Callable[[int, torch.Generator], Iterator[Tensor]]


def in_batches(_model: nn.Module, split: Split) -> Batches:
    return Batches(split, 500)


@dataclass(frozen=True)
class Row:
    """One published number, in per cent, and the method that it was measured with.

    Without a number: what another formula gives in the place of the one above it.
    """

    name: str
    published: float | None
    tolerance: float  # how far ours may be from it; see the protocol
    method: Callable[..., Method]  # takes the model, and a seed if it draws anything
    optimizer: Callable[[Method], Adam | SGD]
    spread: str = ""  # as published
    importance_data: Callable[[nn.Module, Split], Batches] = in_batches  # for `consolidate`
    note: str = ""
    incremental: str = "domain"
    trains_last_alone: bool = False  # the tasks before are only shown to it (joint training)

    @property
    def described(self) -> str:
        """The method with its options: what a recorded run must have been made with to count."""
        options = getattr(self.method, "keywords", {})
        kind = getattr(self.method, "func", self.method)
        return (
            f"{kind.__name__}({', '.join(f'{name}={value!r}' for name, value in options.items())})"
        )

    def make_method(self, model: nn.Module, seed: int) -> Method:
        seeded = "seed" in inspect.signature(self.method).parameters
        return self.method(model, **({"seed": seed} if seeded else {}))


@dataclass(frozen=True)
class Protocol:
    """What the rows of a table share.

    `order` gives the batches of a task as rows of what is trained on; `keep_optimizer` tells
    whether one optimizer sees all tasks; `shuffle_classes`, whether the seed decides which classes
    a task has.
    """

    title: str
    source: str
    tasks: int
    hidden: tuple[int, ...]
    initialize: Callable[[nn.Module], None]
    prepare: Callable[[Dataset], tuple[Split, Split]]
    batch_size: int
    order: Order
    keep_optimizer: bool
    tolerance: str
    rows: tuple[Row, ...]
    scenario: str = "permuted"
    first_is_permuted: bool = True
    shuffle_classes: bool = False

    def model(self, features: int, outputs: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, width in pairwise((features, *self.hidden)):
            layers += [nn.Linear(inputs, width), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(self.hidden[-1], outputs))
        for module in model:
            self.initialize(module)
        return model


def epochs(count: int, batch_size: int) -> Order:
    """Passes over the data, each in a new order, the last smaller batch included."""

    def order(examples: int, random: torch.Generator) -> Iterator[Tensor]:
        for _ in range(count):
            yield from torch.randperm(examples, generator=random).split(batch_size)

    return order


def iterations(count: int, batch_size: int) -> Order:
    """So many whole batches, in a new order whenever the data is used up."""

    def order(examples: int, random: torch.Generator) -> Iterator[Tensor]:
        left = count
        while left > 0:
            whole = torch.randperm(examples, generator=random).split(batch_size)
            whole = whole[: min(left, examples // batch_size)]
            left -= len(whole)
            yield from whole

    return order


def unchanged(data: Dataset) -> tuple[Split, Split]:
    return data.train, data.test


def with_shuffled_classes(data: Dataset, seed: int) -> Dataset:
    """The data with its classes numbered in an order drawn from the seed."""
    order = torch.randperm(data.num_classes, generator=generator(seed))
    train, test = (Split(part.inputs, order[part.labels]) for part in (data.train, data.test))
    return replace(data, train=train, test=test)


def adam(lr: float) -> Callable[[Method], Adam]:
    return lambda method: Adam(method.model.parameters(), lr=lr, method=method)


def sgd(lr: float) -> Callable[[Method], SGD]:
    return lambda method: SGD(method.model.parameters(), lr=lr, method=method)


def verdict(row: Row, accuracy: float) -> str:
    """Whether `accuracy`, in per cent, is what was published; "" where nothing was."""
    if row.published is None:
        return ""
    return "agrees" if abs(accuracy - row.published) <= row.tolerance else "differs"
