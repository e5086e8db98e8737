"""A run: its scenario is loaded, method and model are made ready, and the loop is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from clext.core.console import say
from clext.core.modes import module_mode
from clext.core.seeding import Seeds, isolated_rng
from clext.data.datasets import DIGITS_LR, load_dataset
from clext.data.loaders import LoaderTask
from clext.data.scenario import Scenario, make_scenario
from clext.methods import Method
from clext.training.advice import warn_of_slow_precision
from clext.training.augmentation import augmentation
from clext.training.callbacks import Callback
from clext.training.loop import Training
from clext.training.machine import describe_machine, resolve_device
from clext.training.result import Result
from clext.training.run_folder import RunFolder
from clext.training.settings import Settings
from clext.training.spec import describe, input_dtype
from clext.training.storage import clear, keep
from clext.training.trial import check_forward

Save = Callable[[Result], Path | None]


def load_scenario(settings: Settings, *, announce: bool = True) -> Scenario:
    """The scenario that was given, or is made of the data set, which is loaded."""
    name = settings.scenario
    if not isinstance(name, str):
        return name
    where, show, few = settings.data_dir, settings.progress, settings.lr < DIGITS_LR
    data = load_dataset(settings.dataset, where, show=show, announce=announce, advise=show and few)
    seed = Seeds.derive(settings.seed).scenario
    return make_scenario(name, data, settings.tasks, seed, settings.incremental)


def train_method(
    method: Method,
    scenario: Scenario,
    settings: Settings,
    save: Save,
    *,
    draws: bool = True,
) -> Result:
    """A whole run, see `prepared`."""
    with prepared(method, scenario, settings, save, draws=draws) as training:
        training.learn()
    return training.result


@contextmanager
def prepared(
    method: Method,
    scenario: Scenario,
    settings: Settings,
    save: Save,
    *,
    draws: bool = True,
    folder: RunFolder | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Iterator[Training]:
    """A run of a method that was built on data that was loaded, for the caller to `learn`.

    `save` is called with the result after each task, and when the run ends early. `draws`: the
    model may draw from the global random state, which is then seeded, and restored. In `folder` the
    run is kept; what another one has left there goes, unless it is gone on with (`resume`).
    """
    seeds, device = Seeds.derive(settings.seed), resolve_device(settings.device)
    transform = augmentation(settings.transform, settings.batch_transform)
    draws = draws or transform is not None or isinstance(scenario.tasks[0], LoaderTask)
    with isolated_rng(seeds.model, device) if draws else nullcontext():
        method.model.to(device)
        warn_of_slow_precision(settings.precision, device)
        check_forward(method, scenario, device, transform)
        own = describe(method)
        planned = {**settings.describe(), **own, "data": scenario.data}
        config = {**own, **planned, "seeds": asdict(seeds), **describe_machine(device)}
        result, state = Result.empty(settings.tasks, config), None
        if folder is not None and resume:
            result, state = folder.left(planned) or (result, None)
        training = Training(
            *(method, scenario.to(device, input_dtype(method.model)), settings, result, device),
            lambda: keep(lambda: save(result)),
            folder=folder,
            draws=draws,
            transform=transform,
            callbacks=callbacks,
        )
        if folder is not None and result.complete:
            folder.read_weights(method)
            yield training
            return
        if state is not None:
            training.load_state_dict(state)
            if settings.progress:
                say(f"clext: {method.name} goes on with {training.place}")
        elif folder is not None:
            clear(folder.path)
        with (
            module_mode(method.model, training=True),
            method.heads.trained_on(settings.criterion),
        ):
            yield training
