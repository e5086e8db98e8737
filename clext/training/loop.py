"""The main job: learn a sequence of tasks with one method, and measure what is remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from clext.core.console import say
from clext.core.parameters import trainable_parameters
from clext.core.seeding import Seeds, generator, random_states, set_random_states
from clext.data.datasets import Batches, Split
from clext.data.scenario import Scenario
from clext.methods import Method
from clext.training.advice import warn_if_near_chance
from clext.training.augmentation import Transform, transformed
from clext.training.callbacks import Callback, StopTraining
from clext.training.chance import chance_levels
from clext.training.evaluate import Evaluator
from clext.training.interruptions import Interruptions
from clext.training.optimizers import TaskOptimizer
from clext.training.progress import Progress
from clext.training.result import Result
from clext.training.run_folder import RunFolder
from clext.training.settings import Settings
from clext.training.steps import Steps
from clext.training.storage import as_read
from clext.training.task import begin_task, steps_of_task
from clext.training.timer import Timer


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


@dataclass(frozen=True)
class Place:
    """Where a run is: what comes next, counted from 0, `step` within the epoch."""

    task: int = 0
    epoch: int = 0
    step: int = 0

    @property
    def begins_task(self) -> bool:
        """Whether the task has not begun yet."""
        return self.epoch == self.step == 0

    def __str__(self) -> str:
        return f"task {self.task + 1}, epoch {self.epoch + 1}"


class Training:
    """The loop itself: one task after the other; `result` is filled in as it goes.

    Args:
        method: what learns, its model on `device`.
        scenario: what it learns, on `device` too.
        settings: of the run.
        result: to be filled in.
        device: of all of it.
        save: the result, after each task and where the run ends.
        folder: where it is kept, if anywhere.
        draws: the model may draw from the global random state, which is then part of the state.
        transform: of a batch that the model trains on.
        callbacks: called as it goes.
    """

    def __init__(
        self,
        method: Method,
        scenario: Scenario,
        settings: Settings,
        result: Result,
        device: torch.device,
        save: Callable[[], Path | None],
        *,
        folder: RunFolder | None = None,
        draws: bool = True,
        transform: Transform | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.method, self.scenario, self.settings, self.result = method, scenario, settings, result
        self.device, self.callbacks, self._folder = device, callbacks, folder
        self._save = save
        self._has_checkpoints = folder is not None and folder.has_checkpoints
        self.place, self.total_steps = Place(), 0
        self.optimizer: TaskOptimizer | None = None
        self._steps: Steps | None = None
        self._losses = torch.empty(0)  # of the steps of the last epoch
        self._saved: dict[str, Any] | None = None  # what is left to be taken over in the task
        self._draws, self._transform = draws, transform
        self._random: list[Tensor] = []  # the global random state to go on with
        self.shuffle = generator(Seeds.derive(settings.seed).shuffle)
        self._shuffle_state = self.shuffle.get_state()  # before the epoch was shuffled
        self._interruptions = Interruptions()
        self.timer = Timer(result.timings, device)
        self.evaluator = Evaluator(method, scenario, settings.precision)
        self.bar = Progress(method.name, settings.tasks, settings.epochs, show=settings.progress)

    @property
    def folder(self) -> Path | None:
        """Where the run is kept, if anywhere."""
        return None if self._folder is None else self._folder.path

    @property
    def loss(self) -> Tensor:
        """Of the last step, penalty included: 0-dim, on the device."""
        return self.steps.losses[self.place.step - 1].clone()  # after an epoch, its last

    @property
    def steps(self) -> Steps:
        """Of the task that is being learned."""
        assert self._steps is not None
        return self._steps

    @property
    def accuracies(self) -> list[float]:
        """On each of the tasks seen, after the last epoch; none before the first."""
        return self.result.task_curve[-1] if self.result.task_curve else []

    # ------------------------------------------------------------------ the loop

    def learn(self) -> None:
        """Learn all tasks that are left, if any."""
        if self.result.complete:
            return
        with self.running():
            for _ in self.epochs():
                self.train_epoch()

    @contextmanager
    def running(self) -> Iterator[None]:
        """What is around the loop: bar, callbacks, signals, and at its end what is to be kept."""
        with (
            self.bar,
            self._interruptions if self._has_checkpoints else nullcontext(),
            ExitStack() as ends,
        ):
            try:
                for callback in self.callbacks:
                    callback.on_begin(self)
                    ends.callback(callback.on_end, self)
                yield
            except StopTraining as stop:
                self.result.stopped = str(stop) or "stopped by a callback"
            except BaseException as error:
                # A diverged loss, Ctrl-C, no memory left: whatever it is, what was done is kept.
                self.result.stopped = self._reason(error)
                place = self._save()
                if place is not None:
                    error.add_note(f"What was done so far is saved in {place}.")
                raise
            is_saved = self._save() is not None
            if self._folder is not None:
                is_saved = self._folder.keep_weights(self.method) and is_saved
                if is_saved and self.result.complete:
                    self._folder.complete()
        if self.optimizer is not None:
            self.optimizer.close()

    def _reason(self, error: BaseException) -> str:
        """Why the run ends."""
        if isinstance(error, NonFiniteLossError) and error.result is not self.result:
            return f"ended with the run of seed {error.result.config['seed']}"
        if isinstance(error, KeyboardInterrupt):
            return "interrupted"
        return str(error) or type(error).__name__

    def epochs(self) -> Iterator[None]:
        """All that is left, but for the steps of an epoch: here the caller calls `train_epoch`."""
        tasks = len(self.scenario.tasks)
        if self.place == Place():
            with self.timer.measure("evaluation"):
                self.result.chance[:] = chance_levels(self.scenario)
                untrained = [self.evaluator.accuracy(k, k) for k in range(tasks)]
            self.result.untrained[:] = untrained
        for k in range(self.place.task, tasks):
            yield from self._epochs_of(k)
            if k < tasks - 1:
                self._save()
                self.keep_state()

    def _epochs_of(self, k: int) -> Iterator[None]:
        """What is left of task k, and its end; all tasks so far are tested after every epoch."""
        method, settings, timer, result = self.method, self.settings, self.timer, self.result
        is_new = self.place.begins_task
        if is_new:
            with timer.measure("evaluation"):
                result.before[k] = self.evaluator.accuracy(k, k)
        with timer.measure("training"):
            own, examples = begin_task(method, self.scenario, k, settings.iterations)
            optimizer = self.optimizer_of_task()
            steps = steps_of_task(method, optimizer, settings, own, examples)
            self.begin_schedule(optimizer, steps.per_epoch * settings.epochs)
        self._steps, per_epoch = steps, steps.per_epoch
        if is_new:
            self._call("on_task_begin")
        self.bar.task_start(k, per_epoch, done=self.place.epoch * per_epoch + self.place.step)
        for epoch in range(self.place.epoch, settings.epochs):
            self.bar.epoch_start(k, epoch)
            yield
            if epoch == settings.epochs - 1:
                # Before the last look at the task: a method may predict by what it remembers.
                self.bar.task_end(k)
                with timer.measure("consolidation"):
                    data = Batches(own, settings.batch_size) if isinstance(own, Split) else own
                    method.consolidate(optimizer.optimizer if method.takes_optimizer else data)
            with timer.measure("evaluation"):
                accuracies = self.evaluator.accuracies(k)
            result.task_curve.append(accuracies)
            result.curve.append(fmean(accuracies))
            self.place, self._shuffle_state = Place(k, epoch + 1), self.shuffle.get_state()
            self.bar.epoch_end(k, epoch, self._losses.mean().item(), result.curve[-1])
            self._call("on_epoch_end")
            if epoch < settings.epochs - 1:
                self.keep_state()
        result.accuracy[k, : k + 1] = accuracies
        if isinstance(own, Split):
            warn_if_near_chance(method, settings, k, accuracies[k], own.labels)
        self._call("on_task_end")
        self.place = Place(k + 1)

    def train_epoch(self) -> None:
        """The steps that are left of an epoch."""
        first = self.place.step
        with self.timer.measure("training"), transformed(self.method.model, self._transform):
            self.epoch_done(
                self.steps.run_epoch(self.shuffle, self.step_done, first, self._restore_draws)
            )

    def epoch_done(self, losses: Tensor) -> None:
        """Keep the losses of an epoch's steps; NonFiniteLossError if the run has diverged."""
        self._losses = losses
        step = first_non_finite(losses, self.method.model)
        if step is not None:
            first = self.place.step - len(losses)
            at = (self.place.task, self.place.epoch, first + step)
            raise NonFiniteLossError.at(self.result, *at, losses[step].item())

    def step_done(self) -> None:
        """What is due after a step: accuracies, and the state, so often or when asked to stop."""
        self.bar.step()
        task, epoch, before = self.place.task, self.place.epoch, self.place.step
        self.place = Place(task, epoch, before + 1)
        self.total_steps += 1
        step = epoch * self.steps.per_epoch + before + 1  # of the task
        every = self.settings.evaluate_every
        if every is not None and step % every == 0:
            with self.timer.measure("evaluation"):
                accuracies = self.evaluator.accuracies(task)
            self.result.steps.append({"task": task, "step": step, "accuracy": accuracies})
        self._call("on_step")
        # After the last step of an epoch it is kept with the accuracies that follow.
        is_due = self._folder is not None and self._folder.is_due(step)
        if (is_due or self._interruptions.noted) and before + 1 < self.steps.per_epoch:
            self.keep_state()

    def optimizer_of_task(self) -> TaskOptimizer:
        """A new one, or that of the tasks before."""
        optimizer = self.optimizer
        if optimizer is None or not self.settings.keep_optimizer:
            if optimizer is not None:
                optimizer.close()
            parameters = [*trainable_parameters(self.method.model).values()]
            optimizer = TaskOptimizer(self.settings, self.method, parameters, self.device)
        self.optimizer = optimizer
        return optimizer

    def begin_schedule(self, optimizer: TaskOptimizer, steps: int) -> None:
        """The rates of a task of so many steps, from its beginning or where the run goes on."""
        saved, self._saved = self._saved, None
        if saved is not None:
            optimizer.begin(steps)
            optimizer.load_state_dict(saved)
        if self.place.begins_task:
            optimizer.begin(steps)

    def _call(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self)

    # ------------------------------------------------------------------ going on later

    def keep_state(self) -> None:
        """Write the checkpoint; then a signal that came meanwhile does what it does."""
        if self._folder is None or not self._has_checkpoints:
            return
        with self.timer.measure("saving"):
            self._folder.keep_state(self.state_dict())
        if self._interruptions.noted:
            say(
                "clext: stopped; the same call with resume=True (--resume) goes on from "
                f"{self._folder.path}"
            )
            self._interruptions.deliver()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on, but the data and the settings."""
        optimizer = self.optimizer
        if self.place.begins_task and not self.settings.keep_optimizer:
            optimizer = None
        return {
            "place": astuple(self.place),
            "total_steps": self.total_steps,
            "model": dict(self.method.model.state_dict()),
            "method": self.method.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "shuffle": self._shuffle_state,
            "random": random_states(self.device) if self._draws else [],
            "result": as_read(self.result.to_json()),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over such a state, but for its result."""
        self.place, self.total_steps = Place(*state["place"]), state["total_steps"]
        self.method.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        self._saved = state["optimizer"]
        self._shuffle_state = state["shuffle"]
        self.shuffle.set_state(self._shuffle_state)
        self._random = state["random"]
        self._restore_draws()
        for callback, own in zip(self.callbacks, state["callbacks"], strict=False):
            callback.load_state_dict(own)

    def _restore_draws(self) -> None:
        """Go on with the global random state that was kept."""
        if self._random:
            set_random_states(self.device, self._random)


def first_non_finite(losses: Tensor, model: nn.Module) -> int | None:
    """The first step whose loss, or after the last of which a parameter, is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) > 0:
        return int(bad[0])
    # The last update can break the model without any loss that shows it.
    finite = all(bool(p.detach().isfinite().all()) for p in model.parameters())
    return None if finite else len(losses) - 1
