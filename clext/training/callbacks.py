"""Functions of the user's that a run calls as it goes."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clext.training.loop import Training


class StopTraining(Exception):  # noqa: N818  (no error: the run ends as it should)
    """Raised by a callback: the run ends here, and its result says why it was stopped."""


class Callback:
    """What `clext.train(callbacks=[...])` calls; override what you need.

    The argument is the run itself: `training.method`, `.method.model`, `.settings`, `.result` (so
    far), `.folder` (of `out`, or None), `.place` (`task`, `epoch` and `step` of the epoch, counted
    from 0: what comes next), `.total_steps`, `.loss` (of the last step, penalty included, 0-dim on
    the device, which reading it waits for) and `.accuracies` (after the last epoch, on each of the
    tasks seen). In a run that goes on from a checkpoint only what is left is called. What a
    callback changes on the host (a rate that is no tensor) is not seen by a step that was recorded
    as a CUDA graph.
    """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: numbers, texts, tensors, lists and dicts of these."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with such a state."""

    def on_begin(self, training: Training) -> None:
        """Before everything, also where a run goes on."""

    def on_task_begin(self, training: Training) -> None:
        """Before the first step of a task."""

    def on_step(self, training: Training) -> None:
        """After each step."""

    def on_epoch_end(self, training: Training) -> None:
        """After each epoch, and the accuracies."""

    def on_task_end(self, training: Training) -> None:
        """After a task, which the method has ended too."""

    def on_end(self, training: Training) -> None:
        """After everything, whatever ended it."""


def check_callbacks(given: object) -> None:
    """ValueError unless it is a list of callbacks."""
    if not isinstance(given, Sequence) or not all(isinstance(entry, Callback) for entry in given):
        raise ValueError(
            f"train: callbacks must be a list of clext.Callback objects, got {reprlib.repr(given)}"
        )
