"""Scenarios: a sequence of tasks, made of one data set or of data sets of your own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clext.core.checks import choice, unknown_name
from clext.data.scenario import INCREMENTAL, Scenario, Task
from clext.data.transformed import permuted, rotated, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from clext.data.datasets import Dataset

__all__ = ["INCREMENTAL", "SCENARIOS", "Scenario", "Task", "check_scenario", "make_scenario"]

SCENARIOS: dict[str, Callable[[Dataset, int, int, str], Scenario]] = {
    function.__name__: function for function in (permuted, rotated, split)
}


def make_scenario(
    name: str, dataset: Dataset, tasks: int, seed: int, incremental: str = "domain"
) -> Scenario:
    """The scenario called `name` over `dataset`.

    Args:
        name: one of `SCENARIOS`.
        dataset: its examples are flattened, [N, features].
        tasks: number of tasks.
        seed: of what is drawn (permutations).
        incremental: "task", "domain" or "class", see `Scenario`.

    Raises:
        ValueError: an unknown name, or tasks that the data set cannot be made into.
    """
    check_scenario(name, incremental)
    return SCENARIOS[name](dataset, tasks, seed, incremental)


def check_scenario(name: str, incremental: str) -> None:
    """ValueError if there is no such scenario."""
    if not isinstance(name, str):
        raise ValueError(
            f"train: scenario is a {type(name).__name__}, expected a name ({', '.join(SCENARIOS)}) "
            "or a clext.Scenario; clext.Scenario.from_datasets([(train, test), ...]) makes one"
        )
    if name not in SCENARIOS:
        raise unknown_name("scenario", name, SCENARIOS)
    choice("train", "incremental", incremental, INCREMENTAL)
