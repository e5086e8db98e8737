"""What a run goes on from: tensors and JSON in one file, from which nothing is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from clext.methods import Method
from clext.methods.parts.flat import flattened, nested
from clext.training.storage import CHECKPOINT_NAME, METHOD_NAME, MODEL_NAME, replacing, tidy

_KIND = "checkpoint 1"


class Checkpoint:
    """The state of a run in its folder, replaced as a whole each time.

    Args:
        folder: of the run.
        every: so many steps of a task it is written, beside the ends of epochs.
    """

    def __init__(self, folder: Path, every: int | None = None) -> None:
        self.folder, self.file, self.every = folder, folder / CHECKPOINT_NAME, every

    def is_due(self, step: int) -> bool:
        """Whether it is to be written after this step of a task, counted from 1."""
        return self.every is not None and step % self.every == 0

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace what is there."""
        _write(self.file, flattened({"kind": _KIND, **state}))

    def read(self) -> dict[str, Any] | None:
        """What was written last; None where there is nothing. ValueError for another file."""
        if not self.file.exists():
            return None
        try:
            state = nested(load_file(self.file))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file}: not a checkpoint of clext ({error})") from error
        if state.get("kind") != _KIND:
            raise ValueError(
                f"{self.file}: expected {_KIND!r}, found {state.get('kind')!r}; it was saved by "
                "another version of clext"
            )
        return state

    def remove(self) -> None:
        """The run is over."""
        self.file.unlink(missing_ok=True)
        tidy(self.folder)

    def write_weights(self, method: Method) -> None:
        """The model's state dict as `model.safetensors`, the method's as `method.safetensors`."""
        with replacing(self.folder / MODEL_NAME) as part:
            save_model(method.model, str(part))
        _write(self.folder / METHOD_NAME, method.flat_state_dict())

    def read_weights(self, method: Method) -> None:
        """Give method and model what was written; ValueError if it is of others."""
        try:
            load_model(method.model, self.folder / MODEL_NAME)
            method.load_flat_state_dict(load_file(self.folder / METHOD_NAME))
        except (RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder}: not the weights of this model ({error}); choose another folder, "
                "or overwrite it"
            ) from error


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    # Copies: the file format has no tensors that share their memory.
    copies = {name: entry.detach().to("cpu", copy=True) for name, entry in tensors.items()}
    with replacing(file) as part:
        save_file(copies, part)
