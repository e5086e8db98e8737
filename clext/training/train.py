"""`clext.train`: a method, a model and a scenario are made of names, and the loop is run."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from torch import nn

from clext.core.checks import as_path, count_or_all, integer, listed
from clext.core.seeding import Seeds
from clext.methods import Method
from clext.training.callbacks import Callback, check_callbacks
from clext.training.graphs import can_record
from clext.training.loader_steps import check_tasks
from clext.training.loop import Training
from clext.training.machine import resolve_device
from clext.training.result import Result
from clext.training.run_folder import RunFolder
from clext.training.runs import load_scenario, prepared
from clext.training.settings import Settings, shows_settings
from clext.training.spec import MethodSpec
from clext.training.storage import check_free, claimed_folder
from clext.training.together import learn_together

MOST_SEEDS = 1000


@overload
def train(
    method: str | Sequence[str] | Method,
    *,
    seeds: None = None,
    strength: float | None = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: object,
) -> Result: ...


@overload
def train(
    method: str | Sequence[str],
    *,
    seeds: Iterable[int],
    strength: float | None = None,
    model: str | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    **options: Any,  # noqa: ANN401
) -> list[Result]: ...


@shows_settings
def train(
    method: str | Sequence[str] | Method,
    *,
    seeds: Iterable[int] | None = None,
    strength: float | None = None,
    model: nn.Module | str | None = None,
    out: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    **options: Any,
) -> Result | list[Result]:
    """Learn a sequence of tasks with one method; by default five permutations of MNIST.

    Every task gets a new optimizer, unless it is kept. After every epoch the accuracy on all tasks
    seen is taken. The same seed gives the same bits on the same machine, and the global random
    state is left as it was; also in several threads at once, but for what draws from it
    (dropout, transforms, loaders).

    Args:
        method: a name in `clext.METHODS`; two names, such as ["ewc", "replay"] or "ewc+replay", to
            combine a penalty with a method that rehearses; or an instance (then its model is
            trained).
        dataset: "auto" (MNIST, or scikit-learn's digits where MNIST cannot be had), or strictly
            "mnist", "fashion_mnist", "kmnist", "emnist" (its balanced split), "cifar10",
            "cifar100", "svhn", "tiny_imagenet", "omniglot" or "digits".
        scenario: how the data set becomes tasks: "permuted" (pixels), "rotated" (from 0 to
            below 180 degrees) or "split" (classes); or a `clext.Scenario` with tasks of your own,
            in memory or in data loaders.
        incremental: "domain" (one head for all tasks, the default), "task" (a head for each task,
            known when tested) or "class" (one head that grows; all classes seen compete); see
            `clext.Scenario`.
        tasks: number of tasks, 5 unless a given scenario has its own.
        epochs: passes over the data of each task.
        iterations: steps of each task, in place of epochs: pass after pass, and one look at the
            accuracies at the end.
        batch_size: examples in a step; the last, smaller batch of an epoch is used too.
        lr: learning rate of an optimizer by name.
        optimizer: "adam", "adamw" or "sgd", of `clext.optim`; or a function (parameters, method) ->
            optimizer, any of torch's kind, with the method in its pass or without.
        momentum: of "sgd".
        weight_decay: of an optimizer by name.
        max_grad_norm: the task's gradient is scaled to at most this norm; see `clext.optim`.
        scheduler: of the learning rate over the steps of each task: "cosine" (down to zero), "step"
            (a tenth at half and at three quarters) or "one-cycle"; or a function (optimizer,
            steps) -> scheduler, which is stepped after each step.
        keep_optimizer: go on with the averages of the tasks before; the learning rate starts anew.
        loss: a function (logits [N, C], labels [N]) -> a loss for each example [N], to train on in
            place of the cross entropy, such as `nn.CrossEntropyLoss(reduction="none")`; C are the
            outputs that compete, and what a method measures stays that of the likelihood.
        label_smoothing: of the cross entropy, as in torch's.
        transform: random, of each example that the model trains on, replayed ones too: a function
            of one example, such as those of torchvision.transforms.v2, or "crop-flip": a crop of
            the image padded by 4, mirrored or not.
        batch_transform: of a batch on the device, drawing for each example by itself, such as those
            of kornia.augmentation.
        precision: "fp32", or "bf16": forward and backward in bfloat16 (`torch.autocast`), with
            parameters, optimizer and method state in float32 as before.
        graphs: on CUDA, record a step of each task as a CUDA graph where method, optimizer and
            model allow it, and replay it. Whatever Python does in the model is then what it was at
            the recording: branches, counts, draws of `random` or of a generator on the CPU (dropout
            and other draws on the device are drawn anew). False: launch each step.
        evaluate_every: also take the accuracy on all tasks seen every so many steps, for
            `Result.worst_accuracy`; by default only after each epoch.
        strength: weight of the method's penalty; by default the method's own.
        model: any module from examples ([N, features], of CIFAR and SVHN [N, 3, 32, 32], or shaped
            as those of your own `Scenario`) to logits [N, outputs], trained in place and moved to
            `device`; or the name of one, made for the examples: "mlp" (the default: the course's
            784-1024-512-256-10 perceptron with the outputs that the scenario needs; "mlp-400-400"
            with other hidden widths), "cnn", "resnet18" (for images of 32x32) or "vit_tiny".
        seed: of the model's initial weights, the tasks, the shuffling and the method's sampling.
        seeds: in the place of `seed`, such as `range(5)`, each once: a run for each, which makes
            its own model and method, to be given by name; `out` gets a folder for each, such as
            `seed-3`, without checkpoints. On CUDA, where steps can be recorded (see `graphs`),
            those of all runs are in one graph, beside each other, with data and models of all in
            memory, and times are those of all; else it is one run after the other. The first run
            that fails ends all; `NonFiniteLossError.result` says which.
        device: by default CUDA if there is one, else the CPU.
        data_dir: folder with the data set's files; by default $CLEXT_DATA, then the cache folder.
        out: folder for `result.json`, written after each task; at the end for the weights
            (`model.safetensors`), the method's state (`method.safetensors`) and the pictures; and
            until then a checkpoint, after each epoch. Ctrl-C and SIGTERM write it as well.
        checkpoint_every: also write the checkpoint every so many steps of a task.
        resume: go on from the checkpoint in `out`, to the same bits on the same machine; start
            where there is none, and return the result that is complete. Of functions among the
            settings only their names are compared.
        overwrite: remove what another run has left in `out`, which is refused else.
        callbacks: `clext.Callback` objects, called as the run goes; what they are called for counts
            as training.
        progress: show a progress bar, or a line per epoch where stderr is no terminal.
        **options: options of the method, such as `xi` of "si"; in a combination
            `**{"replay.strength": 3.0}` is for that part alone, see `make_method`.

    Returns:
        The accuracies, timings and settings, and the trained model, see `Result`; with `seeds` a
        list of them.

    Raises:
        ValueError: an argument is wrong, and nothing was done; or the method cannot work on the
            data of a task: the model has learned the tasks before, and `out` holds their results.
        DataError: the data set cannot be had, or its files are damaged.
        OSError: `out` cannot be written, or holds another run; nothing was done.
        NonFiniteLossError: the loss became NaN or infinite; carries the result so far.
    """
    if seeds is not None and "seed" in options:
        raise ValueError("train: expected seed or seeds, got both; leave one of them out")
    settings = Settings.taken_from(options)
    spec = MethodSpec(method, model, strength, options)
    resolve_device(settings.device)
    check_callbacks(callbacks)
    every = count_or_all("train", "checkpoint_every", checkpoint_every)
    if resume and overwrite:
        raise ValueError("train: resume goes on with what overwrite removes; give one of them")
    if out is None and (resume or every is not None):
        raise ValueError("train: resume and checkpoint_every need out, the folder of the run")
    if seeds is not None:
        if resume or every is not None or callbacks:
            raise ValueError(
                "train: resume, checkpoint_every and callbacks are of one run; with seeds leave "
                "them out, or use clext.sweep"
            )
        return _train_each(spec, settings, seeds, out, overwrite)
    with _ready(spec, settings, out, overwrite, every, resume, callbacks) as training:
        training.learn()
    return training.result


def _train_each(
    spec: MethodSpec,
    settings: Settings,
    seeds: Iterable[int],
    out: str | os.PathLike[str] | None,
    overwrite: bool,
) -> list[Result]:
    """A run for each seed: together where steps can be recorded, else one after the other."""
    if not spec.makes_model:
        raise ValueError(
            "train: with seeds each run makes its own method and model; give both by name"
        )
    numbers = listed("train", "seeds", seeds, MOST_SEEDS)
    chosen = [integer("train", "seeds", seed, minimum=0) for seed in numbers]
    folder = None if out is None else as_path(out, "train: out")
    folders = {seed: None if folder is None else folder / f"seed-{seed}" for seed in chosen}
    for place in folders.values():
        if place is not None and place.exists():
            check_free(place, "train: out", overwrite=overwrite, resume=False)

    def run(seed: int, *, progress: bool) -> AbstractContextManager[Training]:
        own = replace(spec, options=copy.deepcopy(spec.options))  # a generator is trained too
        of_seed = replace(settings, seed=seed, progress=settings.progress and progress)
        return _ready(own, of_seed, folders[seed], overwrite, checkpoints=False)

    first, *others = chosen
    with ExitStack() as stack:
        trainings = [stack.enter_context(run(first, progress=True))]
        if settings.can_be_recorded and can_record(trainings[0].method, trainings[0].device):
            trainings += [stack.enter_context(run(seed, progress=False)) for seed in others]
            others = []
        learn_together(trainings)
    results = [training.result for training in trainings]
    del trainings
    for seed in others:
        with run(seed, progress=True) as training:
            training.learn()
        results.append(training.result)
    return results


@contextmanager
def _ready(
    spec: MethodSpec,
    settings: Settings,
    out: str | os.PathLike[str] | None,
    overwrite: bool,
    checkpoint_every: int | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    *,
    checkpoints: bool = True,
) -> Iterator[Training]:
    """The run, ready to learn; its result has the model at the end."""
    seeds = Seeds.derive(settings.seed)
    made = spec.build(seeds, settings.own_scenario)
    with claimed_folder(out, "train: out") as path:
        if path is not None:
            check_free(path, "train: out", overwrite=overwrite, resume=resume)
        scenario = load_scenario(settings)
        if not spec.fits(made, scenario):
            made = spec.build(seeds, scenario)
        check_tasks(made, scenario, settings)

        def save(result: Result) -> Path | None:
            return None if path is None else result.save(path, picture=result.complete)

        with prepared(
            *(made, scenario, settings, save),
            draws=not spec.makes_model,
            folder=None if path is None else RunFolder(path, checkpoint_every, checkpoints),
            resume=resume,
            callbacks=callbacks,
        ) as training:
            yield training
    training.result.model = made.model
