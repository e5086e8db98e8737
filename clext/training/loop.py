"""The main job: learn a sequence of tasks with one method, and measure what is remembered."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import count
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from clext.core.modes import module_mode
from clext.core.parameters import trainable_parameters
from clext.core.seeding import Seeds, generator, isolated_rng
from clext.data.datasets import DIGITS_LR, Batches, Split, load_dataset
from clext.data.scenario import Scenario, make_scenario
from clext.methods import Method
from clext.methods.base import Examples
from clext.training.advice import warn_if_near_chance, warn_of_slow_precision
from clext.training.chance import chance_levels
from clext.training.evaluate import Evaluator
from clext.training.graphs import make_steps
from clext.training.machine import describe_machine, resolve_device
from clext.training.optimizers import TaskOptimizer
from clext.training.progress import Progress
from clext.training.result import Result
from clext.training.settings import Settings, shows_settings
from clext.training.spec import MethodSpec, check_forward, describe, input_dtype
from clext.training.storage import claimed_folder, keep
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


@shows_settings
def train(
    method: str | Sequence[str] | Method,
    *,
    strength: float | None = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: object,
) -> Result:
    """Learn a sequence of tasks with one method; by default five permutations of MNIST.

    Every task gets a new optimizer, unless it is kept. After every epoch the accuracy on all tasks
    seen is taken. The same seed gives the same bits on the same machine, and the global random
    state is left as it was; also in several threads at once, but for models that draw from it
    (dropout).

    Args:
        method: a name in `clext.METHODS`; two names, such as ["ewc", "replay"] or "ewc+replay", to
            combine a penalty with a method that rehearses; or an instance (then its model is
            trained).
        dataset: "auto" (MNIST, or scikit-learn's digits where MNIST cannot be had), or strictly
            "mnist", "fashion_mnist", "kmnist", "emnist" (its balanced split), "cifar10",
            "cifar100", "svhn" or "digits".
        scenario: how the data set becomes tasks: "permuted" (pixels), "rotated" (from 0 to
            below 180 degrees) or "split" (classes); or a `clext.Scenario` with tasks of your own.
        incremental: "domain" (one head for all tasks, the default), "task" (a head for each task,
            known when tested) or "class" (one head that grows; all classes seen compete); see
            `clext.Scenario`.
        tasks: number of tasks, 5 unless a given scenario has its own.
        epochs: passes over the data of each task.
        batch_size: examples in a step; the last, smaller batch of an epoch is used too.
        lr: learning rate.
        optimizer: "adam", "adamw" or "sgd", of `clext.optim`; or a function (parameters, method) ->
            optimizer, any of torch's kind, with the method in its pass or without.
        momentum: of "sgd".
        weight_decay: of an optimizer by name.
        max_grad_norm: the task's gradient is scaled to at most this norm; see `clext.optim`.
        scheduler: of the learning rate over the steps of each task: "cosine" (down to zero), "step"
            (a tenth at half and at three quarters) or "one-cycle"; or a function (optimizer,
            steps) -> scheduler, which is stepped after each step.
        keep_optimizer: go on with the averages of the tasks before; the learning rate starts anew.
        precision: "fp32", or "bf16": forward and backward in bfloat16 (`torch.autocast`), with
            parameters, optimizer and method state in float32 as before.
        evaluate_every: also take the accuracy on all tasks seen every so many steps, for
            `Result.worst_accuracy`; by default only after each epoch.
        strength: weight of the method's penalty; by default the method's own.
        model: any module from examples ([N, features], of CIFAR and SVHN [N, 3, 32, 32], or shaped
            as those of your own `Scenario`) to logits [N, outputs], trained in place and moved to
            `device`; or the name of one, made for the examples: "mlp" (the default: the course's
            784-1024-512-256-10 perceptron with the outputs that the scenario needs; "mlp-400-400"
            with other hidden widths), "cnn", "resnet18" (for images of 32x32) or "vit_tiny".
        seed: of the model's initial weights, the tasks, the shuffling and the method's sampling.
        device: by default CUDA if there is one, else the CPU.
        data_dir: folder with the data set's files; by default $CLEXT_DATA, then the cache folder.
        out: folder for `result.json` (also written after each task) and the pictures.
        progress: show a progress bar, or a line per task where stderr is neither a terminal nor a
            notebook's.
        **options: options of the method, such as `xi` of "si"; in a combination
            `**{"replay.strength": 3.0}` is for that part alone, see `make_method`.

    Returns:
        The accuracies, timings and settings, see `Result`.

    Raises:
        ValueError: an argument is wrong, and nothing was done; or the method cannot work on the
            data of a task: the model has learned the tasks before, and `out` holds their results.
        DataError: the data set cannot be had, or its files are damaged.
        OSError: `out` cannot be written; nothing was done.
        NonFiniteLossError: the loss became NaN or infinite; carries the result so far.
    """
    settings = Settings.taken_from(options)
    spec, seeds = MethodSpec(method, model, strength, options), Seeds.derive(settings.seed)
    resolve_device(settings.device)
    made = spec.build(seeds, settings.own_scenario)
    with claimed_folder(out, "train: out") as folder:
        scenario = load_scenario(settings)
        if not spec.fits(made, scenario):
            made = spec.build(seeds, scenario)
        made.check_classes([task.classes for task in scenario.tasks])

    def save(result: Result) -> Path | None:
        return None if folder is None else result.save(folder, picture=result.complete)

    return run(made, scenario, settings, save, draws=not spec.makes_model)


def load_scenario(settings: Settings, *, announce: bool = True) -> Scenario:
    """The scenario that was given, or is made of the data set, which is loaded."""
    name = settings.scenario
    if not isinstance(name, str):
        return name
    where, show, few = settings.data_dir, settings.progress, settings.lr < DIGITS_LR
    data = load_dataset(settings.dataset, where, show=show, announce=announce, advise=show and few)
    seed = Seeds.derive(settings.seed).scenario
    return make_scenario(name, data, settings.tasks, seed, settings.incremental)


def run(
    method: Method, scenario: Scenario, settings: Settings, save: Save, *, draws: bool = True
) -> Result:
    """`train` with a method that was built and data that was loaded.

    `save` is called with the result after each task, and when the run ends early. `draws`: the
    model may draw from the global random state, which is then seeded, and restored.
    """
    seeds, device = Seeds.derive(settings.seed), resolve_device(settings.device)
    with isolated_rng(seeds.model, device) if draws else nullcontext():
        method.model.to(device)
        warn_of_slow_precision(settings.precision, device)
        check_forward(method.model, scenario, device)
        config = {
            **describe(method),
            **settings.describe(),
            "data": scenario.data,
            "seeds": asdict(seeds),
            **describe_machine(device),
        }
        result = Result.empty(settings.tasks, config)
        scenario = scenario.to(device, input_dtype(method.model))
        try:
            with module_mode(method.model, training=True):
                Training(method, scenario, settings, result, device).learn(save)
        except BaseException as error:
            # A diverged loss, Ctrl-C, no memory left: whatever it is, what was done is kept.
            interrupted = isinstance(error, KeyboardInterrupt)
            result.stopped = "interrupted" if interrupted else str(error) or type(error).__name__
            place = keep(lambda: save(result))
            if place is not None:
                error.add_note(f"What was done so far is saved in {place}.")
            raise
    return result


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
            self.result.chance[:] = chance_levels(self.scenario)
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
            result.task_curve.append(accuracies)
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
