"""The settings of a run: what `clext.train` and `clext.compare` take beside method and model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from clext.core.checks import as_path, check_memory, choice, flag, integer, number, unknown_name
from clext.core.names import (
    DATASETS,
    INCREMENTAL,
    OPTIMIZERS,
    PRECISIONS,
    SCENARIOS,
    SCHEDULERS,
    TRANSFORMS,
)
from clext.training.storage import as_read

if TYPE_CHECKING:
    import torch

    from clext.data.scenario import Scenario

Function = TypeVar("Function", bound=Callable[..., Any])

_OWNER = "train"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings, as `clext.train` explains them; ValueError names one that is wrong.

    Known and checked without torch, which the command line does not wait for.
    """

    scenario: str | Scenario = "permuted"
    incremental: str = "domain"
    tasks: int = 5
    epochs: int = 10
    iterations: int | None = None
    batch_size: int = 128
    lr: float = 1e-4
    optimizer: str | Callable[..., Any] = "adam"
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    scheduler: str | Callable[..., Any] | None = None
    keep_optimizer: bool = False
    loss: Callable[..., Any] | None = None
    label_smoothing: float = 0.0
    transform: str | Callable[..., Any] | None = None
    batch_transform: Callable[..., Any] | None = None
    precision: str = "fp32"
    graphs: bool = True
    evaluate_every: int | None = None
    seed: int = 0
    dataset: str = "auto"
    data_dir: str | os.PathLike[str] | None = None
    device: str | torch.device | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise unknown_name("dataset", self.dataset, DATASETS)
        if self.data_dir is not None:
            as_path(self.data_dir, f"{_OWNER}: data_dir")
        if isinstance(self.scenario, str):
            if self.scenario not in SCENARIOS:
                raise unknown_name("scenario", self.scenario, SCENARIOS)
            choice(_OWNER, "incremental", self.incremental, INCREMENTAL)
        choice(_OWNER, "precision", self.precision, PRECISIONS)
        least = {"tasks": 1, "epochs": 1, "batch_size": 1, "seed": 0}
        for name in ("iterations", "evaluate_every"):
            if getattr(self, name) is not None:
                least[name] = 1
        checked: dict[str, float] = {
            name: integer(_OWNER, name, getattr(self, name), minimum=minimum)
            for name, minimum in least.items()
        }
        check_memory(_OWNER, "tasks", self.tasks, 2 * self.tasks**2)  # the accuracy matrix
        checked["lr"] = number(_OWNER, "lr", self.lr, minimum=0.0, open_minimum=True)
        for name in ("momentum", "weight_decay"):
            checked[name] = number(_OWNER, name, getattr(self, name), minimum=0.0)
        if self.max_grad_norm is not None:
            checked["max_grad_norm"] = number(
                _OWNER, "max_grad_norm", self.max_grad_norm, minimum=0.0, open_minimum=True
            )
        checked["label_smoothing"] = number(
            _OWNER, "label_smoothing", self.label_smoothing, minimum=0.0, maximum=1.0
        )
        if self.iterations is not None:
            checked["epochs"] = 1  # of so many steps
        flag(_OWNER, "keep_optimizer", self.keep_optimizer)
        flag(_OWNER, "graphs", self.graphs)
        self._check_loss()
        self._check_transforms()
        self._check_optimizer()
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # plain numbers, whatever kind was given

    def _check_loss(self) -> None:
        """ValueError for what is no function, or for two losses."""
        if self.loss is not None and not callable(self.loss):
            raise ValueError(
                f"{_OWNER}: loss must be a function (logits, labels) -> a loss for each example, "
                f"got {self.loss!r}"
            )
        if self.loss is not None and self.label_smoothing:
            raise ValueError(
                f"{_OWNER}: label_smoothing is of the cross entropy; leave it to your loss"
            )

    def _check_transforms(self) -> None:
        """ValueError for what is neither a function nor a name."""
        if self.transform is not None and not callable(self.transform):
            choice(_OWNER, "transform", self.transform, TRANSFORMS)
        if self.batch_transform is not None and not callable(self.batch_transform):
            raise ValueError(
                f"{_OWNER}: batch_transform must be a function of a batch, got "
                f"{self.batch_transform!r}"
            )

    def _check_optimizer(self) -> None:
        """ValueError for a name that is none, or an option that this optimizer has not."""
        made = callable(self.optimizer)
        if not made:
            choice(_OWNER, "optimizer", self.optimizer, OPTIMIZERS)
        if self.scheduler is not None and not callable(self.scheduler):
            choice(_OWNER, "scheduler", self.scheduler, SCHEDULERS)
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f'{_OWNER}: momentum is for optimizer="sgd"; leave it out')
        for name in ("weight_decay", "max_grad_norm"):
            if made and getattr(self, name) != getattr(Settings, name):
                raise ValueError(
                    f"{_OWNER}: {name} is for an optimizer by name; leave it to your function"
                )

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Self:
        """The settings among `options`, which are taken out of these; None stands for a default."""
        given = {name: options.pop(name) for name in NAMES if name in options}
        given = {name: value for name, value in given.items() if value is not None}
        if {"epochs", "iterations"} <= given.keys():
            raise ValueError(
                f"{_OWNER}: epochs={given['epochs']!r} and iterations={given['iterations']!r}; "
                "give one of them"
            )
        if not isinstance(given.get("scenario", ""), str):
            given |= _of_own_scenario(given)
        return cls(**given)

    @property
    def own_scenario(self) -> Scenario | None:
        """The scenario, if it was given with its data."""
        return None if isinstance(self.scenario, str) else self.scenario

    @property
    def criterion(self) -> Callable[..., Any] | None:
        """The loss of each example to train on; None for the method's own."""
        if not self.label_smoothing:
            return self.loss
        from torch.nn import CrossEntropyLoss

        return CrossEntropyLoss(label_smoothing=self.label_smoothing, reduction="none")

    @property
    def can_be_recorded(self) -> bool:
        """Whether steps may be recorded as CUDA graphs, as far as the settings tell."""
        return self.graphs and self.transform is None and self.batch_transform is None

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values; the device is described as the one found."""
        values = {name: getattr(self, name) for name in NAMES}
        del values["device"], values["progress"]
        for name in ("optimizer", "scheduler", "loss", "transform", "batch_transform"):
            if callable(values[name]):  # of a function the name
                values[name] = getattr(values[name], "__name__", type(values[name]).__name__)
        values["scenario"] = getattr(self.scenario, "name", self.scenario)
        values["data_dir"] = None if self.data_dir is None else str(self.data_dir)
        return values


NAMES = tuple(field.name for field in fields(Settings))
# What `train` takes beside them and the options of the method.
OF_TRAIN = (
    *("seeds", "strength", "model", "out", "checkpoint_every", "resume", "overwrite", "callbacks"),
    *NAMES,
)


def _of_own_scenario(given: dict[str, Any]) -> dict[str, Any]:
    """What a scenario with tasks of its own has already; ValueError for another choice of it."""
    from clext.data.scenario import Scenario

    scenario = given["scenario"]
    if not isinstance(scenario, Scenario):
        raise ValueError(
            f"{_OWNER}: scenario is a {type(scenario).__name__}, expected a name "
            f"({', '.join(SCENARIOS)}) or a clext.Scenario; "
            "clext.Scenario.from_datasets([(train, test), ...]) makes one"
        )
    own = {"incremental": scenario.incremental, "tasks": len(scenario.tasks)}
    if scenario.batch_size is not None:
        own["batch_size"] = scenario.batch_size
    if given.get("dataset", "auto") != "auto" or "data_dir" in given:
        raise ValueError(
            f"{_OWNER}: the given scenario {scenario.name!r} has its own data; leave out dataset "
            "and data_dir"
        )
    for name, value in own.items():
        if given.get(name, value) != value:
            raise ValueError(
                f"{_OWNER}: {name}={given[name]!r}, but the given scenario has {value!r}; leave it "
                "out"
            )
    return own


def check_same_run(
    owner: str, folder: Path, there: Mapping[str, Any], planned: Mapping[str, Any]
) -> None:
    """ValueError if the run in the folder was of other settings, a method or data than planned."""

    def compared(config: Mapping[str, Any]) -> dict[str, Any]:
        # Wherever the data was found, and however steps are launched.
        data = {**config.get("data", {}), "source": None}
        return {**config, "data_dir": None, "data": data, "graphs": None}

    there = compared(there)
    for name, value in as_read(compared(planned)).items():
        if there.get(name) != value:
            raise ValueError(
                f"{owner}: {folder} holds a run with {name} {there.get(name)!r}, not {value!r}; "
                "choose another folder, or the settings that are there"
            )


def check_option_names(
    label: str,
    options: Iterable[str],
    of_method: Iterable[str],
    of_train: Iterable[str] = OF_TRAIN,
) -> None:
    """ValueError for an option that neither the method nor `train` has."""
    valid = [*dict.fromkeys([*of_method, *of_train])]
    for option in options:
        # That of a part is the method's to check.
        if "." not in option and option not in valid:
            either = f"neither of {label} nor of train" if of_train else f"not of {label}"
            raise unknown_name(f"option, {either}:", option, valid)


def shows_settings(function: Function) -> Function:
    """Lists the settings, which `function` takes as **options, in its signature.

    Without the seed where there are always `seeds`.
    """
    signature = inspect.signature(function)
    *own, rest = signature.parameters.values()
    given = [parameter.name for parameter in own if parameter.default is not None]
    keyword = inspect.Parameter.KEYWORD_ONLY
    settings = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in fields(Settings)
        if f"{field.name}s" not in given
    ]
    function.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[*own, *settings, rest]
    )
    return function
