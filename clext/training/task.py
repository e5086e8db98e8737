"""A task of a run: its beginning, and its steps."""

from __future__ import annotations

from clext.data.datasets import Split
from clext.data.loaders import LoaderBatches, LoaderTask
from clext.data.scenario import Scenario
from clext.methods import Method
from clext.methods.base import Examples
from clext.training.graphs import graphed_or_not
from clext.training.loader_steps import LoaderSteps
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings
from clext.training.steps import Steps, TaskSteps


def begin_task(
    method: Method, scenario: Scenario, k: int, iterations: int | None = None
) -> tuple[Split | LoaderBatches, Examples | None]:
    """Begin task k: its own examples with local labels, and those that the method trains on; or a
    loader's batches, and None. `iterations`: how many of them, if it has no end.
    """
    task, active = scenario.tasks[k], scenario.active(k, k)
    start = 0 if active is None else active.start
    if isinstance(task, LoaderTask):
        method.begin_task(block=task.outputs, active=active)
        return task.train_batches(method.heads.inputs_and_labels, start, iterations), None
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
) -> Steps:
    """On what `begin_task` returned."""
    precision, iterations = settings.precision, settings.iterations
    if isinstance(own, LoaderBatches):
        return LoaderSteps(method, optimizer, own, precision, iterations)
    assert examples is not None
    kind = graphed_or_not(method, optimizer, examples) if settings.can_be_recorded else TaskSteps
    return kind(method, optimizer, examples, settings.batch_size, precision, iterations)
