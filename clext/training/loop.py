"""The main job: learn a sequence of tasks with one method, and measure what is remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from clext.core.parameters import trainable_parameters
from clext.core.seeding import Seeds, generator
from clext.data.datasets import Batches, Split
from clext.data.scenario import Scenario
from clext.methods import Method
from clext.methods.base import Examples
from clext.training.advice import warn_if_near_chance
from clext.training.evaluate import Evaluator
from clext.training.graphs import make_steps
from clext.training.optimizers import TaskOptimizer
from clext.training.progress import Progress
from clext.training.result import Result
from clext.training.settings import Settings
from clext.training.storage import keep
from clext.training.timer import Timer

Save = Callable[[Result], Path | None]


class NonFiniteLossError(RuntimeError):
    """The loss, or a parameter, became NaN or infinite; `result` holds what was done until then."""

    def __init__(self, message: str, result: Result) -> None:
        super().__init__(message)
        self.result = result

    @classmethod
    def at(
        cls, result: Result, task: int, epoch: int, step: int, loss: float
    ) -> NonFiniteLossError:
        """The error for a place in the run, everything counted from 0."""
        config = result.config
        what = f"the loss became {loss}"
        if math.isfinite(loss):
            what = f"a parameter became NaN or infinite (the loss was still {loss:.4g})"
        remedy = f"try a smaller lr (now {config['lr']:g})"
        if config["strength"] is not None and task > 0:  # else there was no penalty yet
            remedy += f" or strength (now {config['strength']:g})"
        return cls(
            f"{config['method']}: {what} at task {task + 1}, epoch {epoch + 1}, step {step + 1}; "
            f"the model's weights are of no use now; {remedy}.",
            result,
        )


class Training:
    """The loop itself: one task after the other; `result` is filled in as it goes."""

    def __init__(
        self,
        method: Method,
        scenario: Scenario,
        settings: Settings,
        result: Result,
        device: torch.device,
    ) -> None:
        self.method, self.scenario, self.settings, self.result = method, scenario, settings, result
        self.device = device
        self.optimizer: TaskOptimizer | None = None
        self.shuffle = generator(Seeds.derive(settings.seed).shuffle)
        self.timer = Timer(result.timings, device)
        self.evaluator = Evaluator(method, scenario, settings.precision)
        self.bar = Progress(method.name, settings.tasks, settings.epochs, show=settings.progress)

    def learn(self, save: Save) -> None:
        """Learn all tasks."""
        tasks = range(len(self.scenario.tasks))
        with self.timer.measure("evaluation"):
            self.result.untrained[:] = [self.evaluator.accuracy(k, k) for k in tasks]
        with self.bar:
            for k in tasks:
                self.learn_task(k)
                keep(lambda: save(self.result))
        if self.optimizer is not None:
            self.optimizer.close()

    def learn_task(self, k: int) -> None:
        """Learn task k and end it; test all tasks so far after every epoch."""
        method, settings, timer, result = self.method, self.settings, self.timer, self.result
        with timer.measure("evaluation"):
            result.before[k] = self.evaluator.accuracy(k, k)
        with timer.measure("training"):
            own, examples = begin_task(method, self.scenario, k)
            per_epoch = math.ceil(len(examples[0]) / settings.batch_size)
            optimizer = self.optimizer_of_task(per_epoch * settings.epochs)
            steps = make_steps(method, optimizer, examples, settings.batch_size, settings.precision)
        self.bar.task_start(k, per_epoch)
        step_done = self.step_counter(k)
        for epoch in range(settings.epochs):
            self.bar.epoch_start(k, epoch)
            with timer.measure("training"):
                order = torch.randperm(len(examples[0]), generator=self.shuffle).to(steps.device)
                with explained(len(order), k, settings.batch_size):
                    losses = steps.run_epoch(order, step_done)
                step = first_non_finite(losses, method.model)
            if step is not None:
                raise NonFiniteLossError.at(result, k, epoch, step, losses[step].item())
            if epoch == settings.epochs - 1:
                # Before the last look at the task: a method may predict by what it remembers.
                self.bar.task_end(k)
                with timer.measure("consolidation"):
                    data = Batches(own, settings.batch_size)
                    method.consolidate(optimizer.optimizer if method.takes_optimizer else data)
            with timer.measure("evaluation"):
                accuracies = self.evaluator.accuracies(k)
            result.curve.append(fmean(accuracies))
            self.bar.epoch_end(k, epoch, losses.mean().item(), result.curve[-1])
        result.accuracy[k, : k + 1] = accuracies
        warn_if_near_chance(method, settings, k, accuracies[k], own.labels)

    def optimizer_of_task(self, steps: int) -> TaskOptimizer:
        """A new one, or that of the tasks before; `steps`: of the task."""
        optimizer = self.optimizer
        if optimizer is None or not self.settings.keep_optimizer:
            if optimizer is not None:
                optimizer.close()
            parameters = [*trainable_parameters(self.method.model).values()]
            optimizer = TaskOptimizer(self.settings, self.method, parameters, self.device)
        optimizer.begin(steps)
        self.optimizer = optimizer
        return optimizer

    def step_counter(self, k: int) -> Callable[[], None]:
        """What is called after each step of task k: the accuracies are due every so often."""
        every, taken = self.settings.evaluate_every, count(1)

        def step_done() -> None:
            self.bar.step()
            step = next(taken)
            if every is not None and step % every == 0:
                with self.timer.measure("evaluation"):
                    accuracies = self.evaluator.accuracies(k)
                self.result.steps.append({"task": k, "step": step, "accuracy": accuracies})

        return step_done


def begin_task(method: Method, scenario: Scenario, k: int) -> tuple[Split, Examples]:
    """Begin task k: its own examples with local labels, and what the method trains on."""
    task, active = scenario.tasks[k], scenario.active(k, k)
    own = task.train()
    if active is not None:
        own = Split(own.inputs, own.labels - active.start)
    examples = method.begin_task(tuple(own), block=task.outputs, active=active)
    return own, tuple(own) if examples is None else examples


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


def first_non_finite(losses: Tensor, model: nn.Module) -> int | None:
    """The first step whose loss, or after the last of which a parameter, is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) > 0:
        return int(bad[0])
    # The last update can break the model without any loss that shows it.
    finite = all(bool(p.detach().isfinite().all()) for p in model.parameters())
    return None if finite else len(losses) - 1
