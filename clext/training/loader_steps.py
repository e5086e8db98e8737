"""Steps on the batches of a user's data loader, and what such a run needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from clext.data.loaders import LoaderBatches, LoaderTask
from clext.data.scenario import Scenario
from clext.methods import Method
from clext.training.optimizers import TaskOptimizer
from clext.training.settings import Settings
from clext.training.steps import Function, Steps


class LoaderSteps(Steps):
    """One step for each batch, as the loader gives it.

    Args:
        method: its model is trained.
        optimizer: of this task, with the method.
        batches: of the task, on the model's device.
        precision: "fp32", or "bf16" for a forward pass in bfloat16.
        iterations: steps of an epoch, of as many passes as it takes; None: one pass.
    """

    def __init__(
        self,
        method: Method,
        optimizer: TaskOptimizer,
        batches: LoaderBatches,
        precision: str,
        iterations: int | None,
    ) -> None:
        super().__init__(method, optimizer, precision)
        self.batches, self.iterations = batches, iterations
        self.per_epoch = iterations or len(batches)

    def run_epoch(
        self,
        shuffle: torch.Generator,
        step_done: Function,
        first: int = 0,
        skipped: Function = lambda: None,
    ) -> Tensor:
        """The loader's batches.

        Before each pass `shuffle` gives torch's global generator a seed, from which a loader draws
        its order and its workers' seeds: so an epoch that was interrupted can be gone through
        again up to `first`, where `skipped` is called.
        """
        passes = islice(self._passes(shuffle), None if self.iterations else 1)
        batches = islice(chain.from_iterable(passes), self.iterations)
        unknown = torch.full((), torch.nan, device=self.device)
        losses = self.losses = [unknown for _ in islice(batches, first)]
        if first:
            skipped()
        for batch in batches:
            losses.append(self.take(batch))
            self.optimizer.step_done()
            step_done()
        return torch.stack(losses)[first:]

    def _passes(self, shuffle: torch.Generator) -> Iterator[Iterable[Any]]:
        while True:
            seed = torch.randint(2**63 - 1, (), generator=shuffle)
            torch.default_generator.manual_seed(int(seed))
            yield self.batches


def check_tasks(method: Method, scenario: Scenario, settings: Settings) -> None:
    """ValueError if the method cannot learn the classes, or needs what loaders do not give."""
    method.check_classes([task.classes for task in scenario.tasks])
    tasks = [task for task in scenario.tasks if isinstance(task, LoaderTask)]
    if not tasks:
        return
    if any(part.needs_examples for part in method.parts):
        raise ValueError(
            f"{method.name} needs all examples of a task at its start, which loaders do not give; "
            "make the scenario by Scenario.from_datasets"
        )
    options = method.heads.options
    own = [name for name in ("forward", "labels", "loss") if options[name] is not None]
    if own and scenario.incremental != "domain":
        raise ValueError(
            f"train: {own[0]}= of {method.name} reads batches as they are, where "
            f'incremental="{scenario.incremental}" gives labels other numbers; let the loaders '
            "give (x, y)"
        )
    for task in tasks if settings.iterations is None else []:
        try:
            len(task.train_loader)  # type: ignore[arg-type]  # that is the check
        except TypeError as error:
            raise ValueError(
                f"train: the training loader of {task.name} has no length; pass iterations, the "
                "steps of each task"
            ) from error
