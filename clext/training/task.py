"""A task of a run: its beginning, its steps, and the order of its examples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from clext.data.datasets import Split
from clext.data.loaders import LoaderBatches, LoaderTask
from clext.data.scenario import Scenario
from clext.methods import Method
from clext.methods.base import Examples
from clext.training.graphs import make_steps
from clext.training.loader_steps import LoaderSteps
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings
from clext.training.steps import TaskSteps


def begin_task(
    method: Method, scenario: Scenario, k: int
) -> tuple[Split | LoaderBatches, Examples | None]:
    """Begin task k: its own examples with local labels, and those that the method trains on; or a
    loader's batches, and None.
    """
    task, active = scenario.tasks[k], scenario.active(k, k)
    start = 0 if active is None else active.start
    if isinstance(task, LoaderTask):
        method.begin_task(block=task.outputs, active=active)
        return task.train_batches(method.heads.inputs_and_labels, start), None
    inputs, labels = task.train()
    own = Split(inputs, labels - start if start else labels)
    examples = method.begin_task(tuple(own), block=task.outputs, active=active)
    return own, tuple(own) if examples is None else examples


def steps_of_task(
    method: Method,
    optimizer: TaskOptimizer,
    settings: Settings,
    own: Split | LoaderBatches,
    examples: Examples | None,
    recorded: bool,
) -> TaskSteps | LoaderSteps:
    """On what `begin_task` returned; `recorded`: as a CUDA graph where that can be."""
    if examples is not None:
        batch_size, precision = settings.batch_size, settings.precision
        return make_steps(method, optimizer, examples, batch_size, precision, recorded=recorded)
    return LoaderSteps(method, optimizer, own, settings.precision, settings.iterations)


def shuffled(examples: int, settings: Settings, random: torch.Generator) -> Tensor:
    """The examples of an epoch, int64: all once, or as many as the iterations need."""
    wanted = (settings.iterations or 0) * settings.batch_size or examples
    passes = [
        torch.randperm(examples, generator=random) for _ in range(math.ceil(wanted / examples))
    ]
    return torch.cat(passes)[:wanted]


@contextmanager
def explained(examples: int, task: int, batch_size: int) -> Iterator[None]:
    """Say of an error inside, raised by the model, if it may be due to a last batch of one."""
    try:
        yield
    except ValueError as error:
        one = examples % batch_size == 1 and batch_size > 1
        if one and "more than 1 value per channel" in str(error):
            error.add_note(
                f"The last batch of task {task + 1} has one example ({examples} in batches of "
                f"{batch_size}), of which a batch norm can make no statistics; choose another "
                "batch_size."
            )
        raise
