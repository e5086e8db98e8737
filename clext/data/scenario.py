"""What a scenario is: tasks, each with data and outputs, and which outputs compete."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clext.core.checks import choice, integer, unknown_name
from clext.core.names import INCREMENTAL
from clext.core.seeding import Seeds
from clext.data.datasets import Dataset, Split, load_dataset
from clext.data.loaders import LoaderTask, loader_tasks
from clext.data.own import own_tasks
from clext.data.scenarios import MAKERS
from clext.data.task import Task


@dataclass(frozen=True, repr=False)
class Scenario:
    """A sequence of tasks for one model with `num_outputs` outputs.

    Args:
        name: as in titles and results.
        incremental: what the model has to tell (van de Ven and Tolias 2019, arXiv:1904.07734):

            - "domain": the classes are the same in all tasks, and one head is shared by all;
            - "task": each task has a head of its own, and the task is known when tested;
            - "class": one head grows over the classes of all tasks, and all classes seen so far
              compete, when a task is learned and when it is tested.
        tasks: in the order in which they are learned.
        data: what a result records of the data: "name" and what else there is to say.

    Raises:
        ValueError: there is no task, or `incremental` is none of the three.
    """

    name: str
    incremental: str
    tasks: Sequence[Task | LoaderTask]
    data: dict[str, Any]

    def __post_init__(self) -> None:
        choice("Scenario", "incremental", self.incremental, INCREMENTAL)
        if not self.tasks:
            raise ValueError("Scenario: expected at least one task, got none")

    def __repr__(self) -> str:
        count = f"{len(self.tasks)} task{'s' if len(self.tasks) != 1 else ''}"
        head = f"Scenario {self.name!r}, {self.incremental}-incremental, {count}:"
        return "\n".join([head, *(f"  {task!r}" for task in self.tasks)])

    @property
    def num_outputs(self) -> int:
        """Outputs that a model needs for all tasks."""
        return max(task.outputs.stop for task in self.tasks)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return self.tasks[0].input_shape

    @property
    def batch_size(self) -> int | None:
        """That of the first task's loader; None where there is none, or it does not say."""
        first = self.tasks[0]
        return (
            getattr(first.train_loader, "batch_size", None)
            if isinstance(first, LoaderTask)
            else None
        )

    def active(self, task: int, seen: int) -> range | None:
        """The outputs that compete in `task` once tasks 0..seen were begun; None for all."""
        if self.incremental == "domain":
            return None
        if self.incremental == "task":
            return self.tasks[task].outputs
        return range(max(known.outputs.stop for known in self.tasks[: max(task, seen) + 1]))

    def to(self, device: torch.device, dtype: torch.dtype) -> Scenario:
        """The same scenario with its tensors on `device`, its tasks' inputs as `dtype`."""
        moved: dict[int, Split] = {}
        return replace(self, tasks=[task.to(device, dtype, moved) for task in self.tasks])

    @classmethod
    def permuted(
        cls,
        dataset: str | Dataset = "auto",
        *,
        tasks: int = 5,
        seed: int = 0,
        incremental: str = "domain",
        data_dir: str | os.PathLike[str] | None = None,
    ) -> Scenario:
        """The tasks of `clext.train(scenario="permuted", ...)` with the same arguments.

        For a loop of one's own, see `Task.train_loader`; or for `clext.train(scenario=...)`. In
        place of a name `dataset` may be a `clext.data.datasets.Dataset`, see `clext.data.text`.

        Raises:
            ValueError: an argument is wrong, or the data cannot be made into such tasks.
            DataError: the data set cannot be had, or its files are damaged.
        """
        return _named("permuted", dataset, tasks, seed, incremental, data_dir)

    @classmethod
    def rotated(
        cls,
        dataset: str | Dataset = "auto",
        *,
        tasks: int = 5,
        seed: int = 0,
        incremental: str = "domain",
        data_dir: str | os.PathLike[str] | None = None,
    ) -> Scenario:
        """The same for `scenario="rotated"`."""
        return _named("rotated", dataset, tasks, seed, incremental, data_dir)

    @classmethod
    def split(
        cls,
        dataset: str | Dataset = "auto",
        *,
        tasks: int = 5,
        seed: int = 0,
        incremental: str = "domain",
        data_dir: str | os.PathLike[str] | None = None,
    ) -> Scenario:
        """The same for `scenario="split"`."""
        return _named("split", dataset, tasks, seed, incremental, data_dir)

    @classmethod
    def from_datasets(
        cls, datasets: Iterable[Any], incremental: str = "domain", *, name: str = "own"
    ) -> Scenario:
        """A scenario of your own tasks.

        Args:
            datasets: for each task a pair (training data, test data), each a pair of tensors
                (inputs [N, ...], integer labels [N]) or a `torch.utils.data.Dataset` of such
                examples with a length, such as those of torchvision. All examples have one shape.
                Everything is read into memory once.
            incremental: see `Scenario`. Labels are, for "domain", numbers from 0 that mean the same
                in all tasks; for "task" and "class" any integers: they get outputs of the model in
                their order, task by task.
            name: as in titles and results.

        Raises:
            ValueError: a task without examples, labels that do not fit, tests with classes that the
                training data of the task have not, shapes or types that differ, or inputs of
                bytes, which no layer with floating-point weights takes.
        """
        choice("Scenario.from_datasets", "incremental", incremental, INCREMENTAL)
        tasks = own_tasks(datasets, incremental)
        counts = {
            "train": sum(len(task.stored_train.labels) for task in tasks),
            "test": sum(len(task.stored_test.labels) for task in tasks),
        }
        return cls(name, incremental, tasks, {"name": "tasks", **counts})

    @classmethod
    def from_loaders(
        cls,
        loaders: Iterable[Any],
        classes: Iterable[Iterable[int]],
        incremental: str = "domain",
        *,
        name: str = "own",
    ) -> Scenario:
        """A scenario of your own data loaders, for `clext.train`: nothing is read into memory.

        Args:
            loaders: for each task a pair (training loader, test loader), such as torch's
                `DataLoader`, of iterable data sets too. Their batches are (x, y, ...), or mappings
                with the labels in "labels"; of others the method's `forward` and `labels` tell,
                where `incremental` is "domain". Each is iterated anew in each epoch, or look at a
                task; `train` needs `iterations` where one that trains has no length.
            classes: for each task the labels that occur in its batches, such as
                `[range(10), range(10)]`, because the batches are not looked at beforehand.
            incremental: see `Scenario`. What labels mean is said in `from_datasets`.
            name: as in titles and results.

        Raises:
            ValueError: these are no pairs of iterables, or classes that do not fit.
        """
        choice("Scenario.from_loaders", "incremental", incremental, INCREMENTAL)
        tasks = loader_tasks(loaders, classes, incremental)
        return cls(name, incremental, tasks, {"name": "loaders"})


def make_scenario(
    name: str, dataset: Dataset, tasks: int, seed: int, incremental: str = "domain"
) -> Scenario:
    """The scenario called `name` over `dataset`.

    Args:
        name: one of `clext.core.names.SCENARIOS`.
        dataset: its images, flattened or not.
        tasks: number of tasks.
        seed: of what is drawn (permutations).
        incremental: "task", "domain" or "class", see `Scenario`.

    Raises:
        ValueError: an unknown name, or tasks that the data set cannot be made into.
    """
    if name not in MAKERS:
        raise unknown_name("scenario", name, MAKERS)
    choice("train", "incremental", incremental, INCREMENTAL)
    made = MAKERS[name](dataset, tasks, seed, incremental)
    return Scenario(name, incremental, made, dataset.describe())


def _named(
    name: str,
    dataset: str | Dataset,
    tasks: int,
    seed: int,
    incremental: str,
    data_dir: str | os.PathLike[str] | None,
) -> Scenario:
    """`make_scenario` of a data set or its name; the seed is a run's, as `clext.train` takes it."""
    owner = f"Scenario.{name}"
    choice(owner, "incremental", incremental, INCREMENTAL)
    tasks = integer(owner, "tasks", tasks, minimum=1)
    drawn = Seeds.derive(integer(owner, "seed", seed, minimum=0)).scenario
    data = dataset if isinstance(dataset, Dataset) else load_dataset(dataset, data_dir)
    return make_scenario(name, data, tasks, drawn, incremental)
