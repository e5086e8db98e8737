"""The settings of a run, checked before any work begins, and what a result records of them."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clext._version import __version__
from clext.core.checks import choice, integer, number
from clext.data.datasets import check_dataset
from clext.data.scenarios import Scenario, check_scenario
from clext.training.storage import as_path

_OWNER = "train"
_DEFAULT_TASKS = 5
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class Settings:
    """What `clext.train` and `clext.compare` take, apart from the method and the model.

    Raises ValueError with one sentence that names the argument.
    """

    dataset: str
    scenario: str | Scenario
    incremental: str
    tasks: int
    epochs: int
    batch_size: int
    lr: float
    precision: str
    evaluate_every: int | None
    seed: int
    device: torch.device
    data_dir: str | os.PathLike[str] | None
    progress: bool

    @classmethod
    def checked(
        cls,
        *,
        dataset: str,
        scenario: str | Scenario,
        incremental: str | None,
        tasks: int | None,
        epochs: int,
        batch_size: int,
        lr: float,
        precision: str,
        evaluate_every: int | None,
        seed: int,
        device: str | torch.device | None,
        data_dir: str | os.PathLike[str] | None,
        progress: bool,
    ) -> Settings:
        """The settings with the device resolved; ValueError names the one that is wrong."""
        if isinstance(scenario, Scenario):
            _check_own(scenario, dataset, incremental, tasks, data_dir)
            incremental, tasks = scenario.incremental, len(scenario.tasks)
        else:
            check_dataset(dataset)
            if data_dir is not None:
                as_path(data_dir, f"{_OWNER}: data_dir")
            incremental = "domain" if incremental is None else incremental
            check_scenario(scenario, incremental)
            tasks = _DEFAULT_TASKS if tasks is None else tasks
        if evaluate_every is not None:
            evaluate_every = integer(_OWNER, "evaluate_every", evaluate_every, minimum=1)
        return cls(
            dataset=dataset,
            scenario=scenario,
            incremental=incremental,
            tasks=integer(_OWNER, "tasks", tasks, minimum=1),
            epochs=integer(_OWNER, "epochs", epochs, minimum=1),
            batch_size=integer(_OWNER, "batch_size", batch_size, minimum=1),
            lr=number(_OWNER, "lr", lr, minimum=0.0, open_minimum=True),
            precision=choice(_OWNER, "precision", precision, PRECISIONS),
            evaluate_every=evaluate_every,
            seed=integer(_OWNER, "seed", seed, minimum=0),
            device=resolve_device(device),
            data_dir=data_dir,
            progress=progress,
        )

    def describe(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            "scenario": getattr(self.scenario, "name", self.scenario),
            "incremental": self.incremental,
            "tasks": self.tasks,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "precision": self.precision,
            "evaluate_every": self.evaluate_every,
            "seed": self.seed,
            "dataset": self.dataset,
            "data_dir": None if self.data_dir is None else str(self.data_dir),
        }


def _check_own(
    scenario: Scenario,
    dataset: str,
    incremental: str | None,
    tasks: int | None,
    data_dir: str | os.PathLike[str] | None,
) -> None:
    """ValueError for a setting that a scenario with tasks of its own has already."""
    if dataset != "auto" or data_dir is not None:
        raise ValueError(
            f"{_OWNER}: the given scenario {scenario.name!r} has its own data; leave out dataset "
            "and data_dir"
        )
    if incremental not in (None, scenario.incremental):
        raise ValueError(
            f"{_OWNER}: incremental={incremental!r}, but the given scenario is "
            f"{scenario.incremental}-incremental; leave it out"
        )
    if tasks not in (None, len(scenario.tasks)):
        raise ValueError(
            f"{_OWNER}: tasks={tasks!r}, but the given scenario has {len(scenario.tasks)}; leave "
            "it out"
        )


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The given device if this machine has it; for None CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved).tolist()  # "meta" is a device, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(
            f"{_OWNER}: device {str(device)!r} is not available here ({reason}); "
            f"leave device out to use {resolve_device(None)}"
        ) from error
    return resolved


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions: what else decides time and the last bits of a result."""
    return {
        "device": str(device),
        "device_name": (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        ),
        "threads": torch.get_num_threads(),
        "versions": {
            "clext": __version__,
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
    }
