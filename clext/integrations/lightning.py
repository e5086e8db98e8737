"""Lightning: a callback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from clext.core.inputs import mapped
from clext.core.sharding import whole
from clext.integrations.steps import Steps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.optim import Optimizer

    from clext.methods.base import Method


class ContinualCallback(Callback):
    """A method in Lightning's loop, its state in Lightning's checkpoints.

    The pull is added before Lightning clips, once for each step of the optimizer, however many
    batches it accumulates, and `update` follows the steps that are taken. For each task::

        method = clext.EWC(module)
        for loader in tasks:
            callback = ContinualCallback(method, consolidate=True)
            trainer = Trainer(max_epochs=3, gradient_clip_val=1.0, callbacks=[callback])
            trainer.fit(module, loader)

    A method with a loss of its own has it in the module's `training_step`, as
    `return method.loss(x, y)`.

    Args:
        method: of the module, or of a part of it. Its optimizer is any, made without `method=`.
        consolidate: end the task on the training data when the fit ends.

    Raises:
        TypeError: it is no method of clext.
        ValueError: when a fit starts: see `Steps.begin`.
    """

    def __init__(self, method: Method, *, consolidate: bool = False) -> None:
        self.method, self.consolidate = method, consolidate
        self._steps = Steps(type(self).__name__, method)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Follow the optimizer that was made for this fit."""
        self._steps.begin(trainer.optimizers)

    def on_before_optimizer_step(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        optimizer: Optimizer,
    ) -> None:
        """Add the pull to the task's gradients, which are complete and not clipped yet."""
        if optimizer is self._steps.optimizer:
            # Scaled still, where the optimizer unscales them in its step.
            self.method.add_penalty_grad_(getattr(trainer.precision_plugin, "scaler", None))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """End the task, if that was asked for."""
        optimizer = self._steps.optimizer
        self._steps.end()
        if self.consolidate:
            self.method.consolidate(optimizer if self.method.takes_optimizer else _Batches(trainer))

    def state_dict(self) -> dict[str, Any]:
        """The method's state; of a sharded model whole, as Lightning saves that of one process."""
        state: dict[str, Any] = mapped(whole, self.method.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the method."""
        self.method.load_state_dict(state_dict)


class _Batches:
    """The training data as the module gets it: in its precision, on its device."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        # Which of several processes has which rows.
        self.batch_sampler = getattr(trainer.train_dataloader, "batch_sampler", None)

    def __iter__(self) -> Iterator[Any]:
        strategy, precision = self._trainer.strategy, self._trainer.precision_plugin
        for batch in self._trainer.train_dataloader or ():
            yield strategy.batch_to_device(precision.convert_input(batch))
