"""Avalanche: a plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from avalanche.core import SupervisedPlugin
from torch.utils.data import DataLoader

from clext.integrations.steps import Steps

if TYPE_CHECKING:
    from clext.methods.base import Method


class ClextPlugin(SupervisedPlugin):
    """A method in the loop of Avalanche's strategies, over all experiences.

    It follows heads that grow from experience to experience, adds its pull before each step, and
    ends a task on the experience's own data::

        method = clext.EWC(model)
        strategy = Naive(
            model=model, optimizer=optimizer, train_mb_size=64, plugins=[ClextPlugin(method)]
        )
        for experience in benchmark.train_stream:
            strategy.train(experience)

    A model that takes the task's label as well is told to the method, `forward=lambda model, batch:
    model(batch[0], batch[2])`. A method with a loss of its own takes the place of the strategy's
    criterion, at the price of one more forward pass.

    Args:
        method: of the strategy's model. Its optimizer is any, made without `method=`.

    Raises:
        TypeError: it is no method of clext.
        ValueError: when an experience begins: see `Steps.begin`.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method
        self._steps = Steps(type(self).__name__, method)

    def before_training_exp(self, strategy: Any, **_: Any) -> None:
        """Begin a task, after the model has grown and the optimizer was told."""
        self._steps.begin([strategy.optimizer])
        self.method.begin_task()

    def before_backward(self, strategy: Any, **_: Any) -> None:
        """The loss of a method that has its own."""
        if self.method.has_own_loss:
            strategy.loss = self.method.loss(*strategy.mbatch)

    def before_update(self, strategy: Any, **_: Any) -> None:  # noqa: ARG002
        """Add the pull to the task's gradients."""
        self.method.add_penalty_grad_()

    def after_training_exp(self, strategy: Any, **_: Any) -> None:
        """End the task."""
        self._steps.end()
        data = strategy.experience.dataset
        loader = DataLoader(
            data,
            batch_size=strategy.train_mb_size,
            collate_fn=data.collate_fn,
            shuffle=getattr(self.method, "samples", None) is not None,  # it measures the first
        )
        self.method.consolidate(strategy.optimizer if self.method.takes_optimizer else loader)
