"""Transformers and TRL: a Trainer, a mixin that makes one of any other, and a callback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from clext.core.sharding import is_sharded
from clext.integrations.steps import Steps

if TYPE_CHECKING:
    from os import PathLike

    from torch import Tensor, nn
    from transformers import Trainer as AnyTrainer
    from transformers import TrainerState, TrainingArguments

    from clext.methods.base import Method
else:
    AnyTrainer = object


class MethodCheckpoint(TrainerCallback):
    """The method's state in every checkpoint of a Trainer, and back when it resumes.

    A `ContinualTrainer` has it already. A plain Trainer, whose optimizer of `clext.optim` was given
    the method, takes it as `callbacks=[MethodCheckpoint(method)]`; it then resumes from a
    checkpoint in its own `output_dir`.

    Args:
        method: whose state it is.

    Raises:
        FileNotFoundError: when training is resumed, and the checkpoint was saved without it.
    """

    file_name = "continual_method.pt"

    def __init__(self, method: Method) -> None:
        self.method = method
        self.resume_from: str | PathLike[str] | None = None  # None: the Trainer's own folder

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **_k: Any) -> None:
        """Write the state into the folder that the Trainer has just written."""
        path = self._path(_folder(args, state))
        if self._is_sharded:  # each process has a part
            from torch.distributed.checkpoint.state_dict_saver import save

            save({"method": self.method}, checkpoint_id=path)
        elif args.should_save:
            torch.save(self.method.state_dict(), path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Take over the state, if training is resumed."""
        if state.global_step > 0:
            self._load(self.resume_from or _folder(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any
    ) -> None:
        """Go back with the model, if the Trainer has gone back to the best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(state.best_model_checkpoint)

    @property
    def _is_sharded(self) -> bool:
        return any(map(is_sharded, self.method.model.parameters()))

    def _path(self, folder: str | PathLike[str]) -> Path:
        """A file; of sharded state a folder."""
        path = Path(folder) / self.file_name
        return path.with_suffix("") if self._is_sharded else path

    def _load(self, folder: str | PathLike[str]) -> None:
        self.method._follow_model()  # it may have been made before the model was sharded
        path = self._path(folder)
        if not path.exists():
            raise FileNotFoundError(
                f"{type(self).__name__}: {folder} has no {path.name}, so {self.method.name} "
                "was not saved with this checkpoint; resume from one that has it"
            )
        if self._is_sharded:
            from torch.distributed.checkpoint.state_dict_loader import load

            load({"method": self.method}, checkpoint_id=path)
        else:
            self.method.load_state_dict(torch.load(path, map_location="cpu"))


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


class _Begin(TrainerCallback):
    """Begins to follow the steps when the Trainer has wrapped, sharded and moved what it will."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def on_train_begin(self, *_: Any, optimizer: Any, **_k: Any) -> None:
        """Of accelerate's optimizer the one inside."""
        self._steps.begin([getattr(optimizer, "optimizer", optimizer)])


class ContinualMixin(AnyTrainer):
    """A method in the loop of any Trainer, TRL's too, its state in the Trainer's checkpoints.

    The pull is added before the Trainer clips, once for each step of the optimizer, however many
    batches it accumulates, and `update` follows the steps that are taken. A method with a loss of
    its own makes the loss of the training::

        class ContinualSFTTrainer(ContinualMixin, SFTTrainer): ...

        trainer = ContinualSFTTrainer(model, args, train_dataset=data, method=clext.EWC(model))
        trainer.train()
        trainer.method.consolidate(trainer.get_train_dataloader())  # the end of the task

    Args:
        method: of the model that is trained. The optimizer is any, made without `method=`.

    Raises:
        TypeError: it is no method of clext.
        ValueError: when training starts: see `Steps.begin`.
    """

    def __init__(self, *args: Any, method: Method, **kwargs: Any) -> None:
        self.method = method
        self._steps = Steps(type(self).__name__, method)
        self._checkpoint = MethodCheckpoint(method)
        super().__init__(*args, **kwargs)
        self.add_callback(_Begin(self._steps))
        self.add_callback(self._checkpoint)
        if method.has_own_loss:  # a mean over the batch, so the Trainer is to divide it
            self.model_accepts_loss_kwargs = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's."""
        named = not isinstance(resume_from_checkpoint, bool)  # True: the last one of its own
        self._checkpoint.resume_from = resume_from_checkpoint if named else None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._steps.end()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's; with the last batch of a step the pull joins the gradients."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self.method.add_penalty_grad_(self.accelerator.scaler)
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, or in training that of a method with a loss of its own."""
        if self.method.has_own_loss and model.training:
            with self.method.heads.calling(model):
                return self.method.loss(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)


class ContinualTrainer(ContinualMixin, Trainer):
    """Transformers' Trainer with a method; see `ContinualMixin`.

    For each task::

        trainer = ContinualTrainer(model, args, train_dataset=data, method=clext.EWC(model))
        trainer.train()
        trainer.method.consolidate(trainer.get_train_dataloader())  # the end of the task
    """
