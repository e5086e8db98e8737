"""`clext.train`: a method, a model and a scenario are made of names, and the loop is run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from torch import nn

from clext.core.modes import module_mode
from clext.core.seeding import Seeds, isolated_rng
from clext.data.datasets import DIGITS_LR, load_dataset
from clext.data.scenario import Scenario, make_scenario
from clext.methods import Method
from clext.training.advice import warn_of_slow_precision
from clext.training.loop import Training
from clext.training.machine import describe_machine, resolve_device
from clext.training.result import Result
from clext.training.settings import Settings, shows_settings
from clext.training.spec import MethodSpec, check_forward, describe, input_dtype
from clext.training.storage import claimed_folder, keep

Save = Callable[[Result], Path | None]


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
        out: folder for `result.json` (also written after each task) and the picture.
        progress: show a progress bar, or a line per epoch where stderr is no terminal.
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
