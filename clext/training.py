"""The main job: learn a sequence of tasks with one method, and measure what is remembered."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from clext.data import Batches, Dataset, Split, load_dataset
from clext.learner import LearnerSpec, describe_learner, input_dtype
from clext.methods import Method
from clext.module_mode import module_mode
from clext.optim import Adam
from clext.parameters import trainable_parameters
from clext.progress import Progress
from clext.result import Result
from clext.scenarios import Task, make_scenario
from clext.seeding import Seeds, generator, isolated_rng
from clext.settings import Settings, describe_machine
from clext.steps import autocast, make_steps
from clext.storage import keep, writable_folder

Save = Callable[[Result], Path | None]

# Large enough that a batch keeps every core busy, small enough for any model's activations.
EVALUATION_BATCH = 1000


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
        return cls(
            f"{config['method']}: {what} at task {task + 1}, epoch {epoch + 1}, step {step + 1}; "
            f"the model's weights are of no use now; try a smaller lr (now {config['lr']:g}) or "
            f"strength (now {config['strength']:g})",
            result,
        )


def train(
    method: str | Method,
    *,
    dataset: str = "auto",
    scenario: str = "permuted",
    tasks: int = 5,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 1e-4,
    precision: str = "fp32",
    strength: float | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    data_dir: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **method_options: object,
) -> Result:
    """Learn a sequence of tasks with one method; by default five permutations of MNIST.

    Every task gets a new Adam. After every epoch the accuracy on all tasks seen is taken. The same
    seed gives the same bits on the same machine; the global random state is left as it was.

    Args:
        method: a name in `clext.METHODS`, or an instance (then its model is trained).
        dataset: "auto" (MNIST, or scikit-learn's digits where MNIST cannot be had), or strictly
            "mnist", "fashion_mnist" or "digits".
        scenario: how the data set becomes tasks: "permuted".
        tasks: number of tasks.
        epochs: passes over the data of each task.
        batch_size: examples in a step; the last, smaller batch of an epoch is used too.
        lr: learning rate of Adam.
        precision: "fp32", or "bf16": forward and backward in bfloat16 (`torch.autocast`), with
            parameters, optimizer and method state in float32 as before.
        strength: weight of the method's penalty; by default the method's own.
        model: any module from [N, features] float inputs to logits [N, classes], trained in place
            and moved to `device`; by default the course's 784-1024-512-256-10 perceptron.
        seed: of the model's initial weights, the tasks, the shuffling and the method's sampling.
        device: by default CUDA if there is one, else the CPU.
        data_dir: folder with the data set's files; by default $CLEXT_DATA, then the cache folder.
        out: folder for `result.json` (also written after each task) and the picture.
        progress: show a progress bar, or a line per epoch where stderr is no terminal.
        **method_options: options of the method, such as `xi` of "si".

    Returns:
        The accuracies, timings and settings, see `Result`.

    Raises:
        ValueError: an argument is wrong; nothing was done.
        DataError: the data set cannot be had, or its files are damaged.
        OSError: `out` cannot be written; nothing was done.
        NonFiniteLossError: the loss became NaN or infinite; carries the result so far.
    """
    settings = Settings.checked(
        dataset=dataset,
        scenario=scenario,
        tasks=tasks,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        precision=precision,
        seed=seed,
        device=device,
        data_dir=data_dir,
        progress=progress,
    )
    spec = LearnerSpec(method, model, strength, method_options)
    spec.check()
    folder = None if out is None else writable_folder(out, "train: out")
    data = load_dataset(settings.dataset, settings.data_dir, show=progress)

    def save(result: Result) -> Path | None:
        return None if folder is None else result.save(folder, picture=result.complete)

    return run(spec, data, settings, save)


def run(spec: LearnerSpec, data: Dataset, settings: Settings, save: Save) -> Result:
    """`train` on checked arguments and loaded data.

    `save` is called with the result after each task, and when the run ends early.
    """
    seeds = Seeds.derive(settings.seed)
    scenario = make_scenario(settings.scenario, data, settings.tasks, seeds.scenario)
    with isolated_rng(seeds.model, settings.device):
        method = spec.build(data.features, scenario.num_outputs, settings.device, seeds.method)
        result = Result.empty(
            settings.tasks,
            {
                **describe_learner(method),
                **settings.describe(),
                "data": data.describe(),
                "seeds": asdict(seeds),
                **describe_machine(settings.device),
            },
        )
        try:
            with module_mode(method.model, training=True):
                learn(method, scenario.tasks, data, settings, result, save)
        except BaseException as error:
            # A diverged loss, Ctrl-C, no memory left: whatever it is, what was done is kept.
            interrupted = isinstance(error, KeyboardInterrupt)
            result.stopped = "interrupted" if interrupted else str(error) or type(error).__name__
            place = keep(lambda: save(result))
            if place is not None:
                error.add_note(f"What was done so far is saved in {place}.")
            raise
    return result


def learn(
    method: Method,
    tasks: Sequence[Task],
    data: Dataset,
    settings: Settings,
    result: Result,
    save: Save,
) -> None:
    """The loop itself, one task after the other; `result` is filled in as it goes."""
    model, device = method.model, settings.device
    data = data.to(device, input_dtype(model))
    shuffle = generator(result.config["seeds"]["shuffle"])
    step_count = math.ceil(len(data.train.labels) / settings.batch_size)
    clock = Clock(result.timings, device)
    with Progress(
        method.name, settings.tasks, settings.epochs, step_count, show=settings.progress
    ) as bar:
        for k, task in enumerate(tasks):
            with clock.measure("training"):
                train_split = task.transform(data.train)
                parameters = trainable_parameters(model).values()
                optimizer = Adam(parameters, lr=settings.lr, method=method)
                steps = make_steps(
                    method, optimizer, train_split, settings.batch_size, settings.precision
                )
            for epoch in range(settings.epochs):
                bar.epoch_start(k, epoch)
                with clock.measure("training"):
                    order = torch.randperm(len(train_split.labels), generator=shuffle).to(device)
                    losses = steps.run_epoch(order, bar.step)
                    step = first_non_finite(losses, model)
                if step is not None:
                    raise NonFiniteLossError.at(result, k, epoch, step, losses[step].item())
                with clock.measure("evaluation"):
                    seen = (seen_task.transform(data.test) for seen_task in tasks[: k + 1])
                    accuracies = [evaluate(model, split, settings.precision) for split in seen]
                result.curve.append(fmean(accuracies))
                bar.epoch_end(k, epoch, losses.mean().item(), result.curve[-1])
            result.accuracy[k, : k + 1] = accuracies
            bar.task_end(k)
            with clock.measure("consolidation"):
                method.consolidate(Batches(train_split, settings.batch_size))
            keep(lambda: save(result))


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, precision: str = "fp32") -> float:
    """The share of `split` that the model, in eval mode, classifies correctly."""
    device = split.labels.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with module_mode(model, training=False), autocast(device, precision):
        for inputs, labels in Batches(split, EVALUATION_BATCH):
            correct += (model(inputs).argmax(dim=1) == labels).sum()
    return int(correct) / len(split.labels)


def first_non_finite(losses: Tensor, model: nn.Module) -> int | None:
    """The first step whose loss, or after the last of which a parameter, is not finite."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) > 0:
        return int(bad[0])
    # The last update can break the model without any loss that shows it.
    finite = all(bool(p.detach().isfinite().all()) for p in model.parameters())
    return None if finite else len(losses) - 1


class Clock:
    """Adds up the seconds of each kind of work, including what the device still has to do."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self._seconds, self._device = seconds, device

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time inside as `name`."""
        start = time.perf_counter()
        yield
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
