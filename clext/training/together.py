"""Several runs at once, whose steps share one CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from clext.training.graphs import GraphedSteps, StepsTogether
from clext.training.loop import Training


def learn_together(trainings: Sequence[Training]) -> None:
    """Learn all tasks of each run, as `Training.learn` does, epoch by epoch beside each other.

    Runs whose steps are not recorded take theirs in turn. An error of one of them ends all; each
    keeps what it did.
    """
    together: StepsTogether | None = None
    with ExitStack() as stack:
        for training in trainings:
            stack.enter_context(training.running())
        for _ in zip(*(training.epochs() for training in trainings), strict=True):
            steps = [t.steps for t in trainings if isinstance(t.steps, GraphedSteps)]
            if len(steps) < len(trainings):
                for training in trainings:
                    training.train_epoch()
                continue
            if together is None or together.runs != steps:  # a new task
                together = StepsTogether(steps)
            train_epoch_together(trainings, together)


def train_epoch_together(trainings: Sequence[Training], together: StepsTogether) -> None:
    """The steps of an epoch of each, in which all of them count as the training of each."""
    with ExitStack() as timers:
        for training in trainings:
            timers.enter_context(training.timer.measure("training"))
        orders = [
            steps.order_of_epoch(training.shuffle)
            for steps, training in zip(together.runs, trainings, strict=True)
        ]
        losses = together.train_on(orders, [training.step_done for training in trainings])
    for training, own in zip(trainings, losses, strict=True):
        training.epoch_done(own)
