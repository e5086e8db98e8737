"""The folder of a run: what it leaves there, and what it goes on from.

Tensors are in safetensors files, everything else is JSON: nothing is unpickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from clext.methods import Method
from clext.methods.parts.flat import flattened, nested
from clext.training.result import Result
from clext.training.settings import check_same_run
from clext.training.storage import (
    CHECKPOINT_NAME,
    METHOD_NAME,
    MODEL_NAME,
    RESULT_NAME,
    replacing,
    tidy,
)

_KIND = "checkpoint 1"


class RunFolder:
    """Weights, and until the run is complete a checkpoint, each replaced as a whole.

    Args:
        path: the folder.
        every: so many steps of a task the checkpoint is due, beside the ends of epochs.
        has_checkpoints: False for a run that is not gone on with.
    """

    def __init__(self, path: Path, every: int | None = None, has_checkpoints: bool = True) -> None:
        self.path, self.checkpoint, self.every = path, path / CHECKPOINT_NAME, every
        self.has_checkpoints = has_checkpoints

    def is_due(self, step: int) -> bool:
        """Whether the checkpoint is, after this step of a task, counted from 1."""
        return self.every is not None and step % self.every == 0

    def keep_state(self, state: Mapping[str, Any]) -> None:
        """Write the checkpoint; a warning where that fails: it must not cost the run."""
        try:
            _write(self.checkpoint, flattened({"kind": _KIND, **state}))
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            warnings.warn(f"the run cannot be gone on with from here ({error})", stacklevel=2)

    def keep_weights(self, method: Method) -> bool:
        """Write the state dicts of model and method; False, and a warning, where that fails."""
        try:
            with replacing(self.path / MODEL_NAME) as part:
                save_model(method.model, str(part))
            _write(self.path / METHOD_NAME, method.flat_state_dict())
        except (OSError, TypeError, ValueError, RuntimeError) as error:
            warnings.warn(f"the weights could not be saved ({error})", stacklevel=2)
            return False
        return True

    def complete(self) -> None:
        """All is written: there is nothing to go on with."""
        self.checkpoint.unlink(missing_ok=True)
        tidy(self.path)

    def left(self, planned: Mapping[str, Any]) -> tuple[Result, dict[str, Any] | None] | None:
        """The result of the run so far, and its state, unless it is complete.

        None where there is nothing to go on from; ValueError if it is another run than was planned.
        """
        state = self._state()
        if state is not None:
            result = Result.from_json(state["result"], str(self.checkpoint))
        elif (self.path / RESULT_NAME).exists():
            result = Result.load(self.path)
        else:
            return None
        check_same_run("train: out", self.path, result.config, planned)
        return (result, state) if result.complete or state is not None else None

    def _state(self) -> dict[str, Any] | None:
        if not self.checkpoint.exists():
            return None
        try:
            state = nested(load_file(self.checkpoint))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.checkpoint}: not a checkpoint of clext ({error})") from error
        if state.get("kind") != _KIND:
            raise ValueError(
                f"{self.checkpoint}: expected {_KIND!r}, found {state.get('kind')!r}; it was saved "
                "by another version of clext"
            )
        return state

    def read_weights(self, method: Method) -> None:
        """Give method and model what was kept; ValueError if it is of others."""
        try:
            method.load_flat_state_dict(load_file(self.path / METHOD_NAME))
            load_model(method.model, self.path / MODEL_NAME)
        except (RuntimeError, OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.path}: not the weights of this model ({error}); choose another folder, or "
                "overwrite it"
            ) from error


def _write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """The file format has no tensors that share their memory."""
    written, seen = {}, set[int]()
    for name, entry in tensors.items():
        there = entry.detach().to("cpu").contiguous()
        memory = there.untyped_storage()
        if memory.nbytes() != there.nbytes or memory.data_ptr() in seen:
            there = there.clone()
        seen.add(there.untyped_storage().data_ptr())
        written[name] = there
    with replacing(file) as part:
        save_file(written, part)
