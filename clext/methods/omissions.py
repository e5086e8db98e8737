"""What a training loop has left out, where it shows at the end of a task.

A warning that is wrong once is not read again, so nothing is said where another loop could have
meant it: only what was called, whether parameters were written and which data was given count.
"""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor

    from clext.methods.base import Method

# Of the task that ended last. Not in the method itself: a copy of it, or a pickle, knows of no end.
_ends: WeakKeyDictionary[Method, End] = WeakKeyDictionary()


class End:
    """The end of a task: the parameters as they are, and the data that was given.

    Args:
        method: ends it.
        dataloader: that of `consolidate`, before anything is read from it.
    """

    def __init__(self, method: Method, dataloader: object) -> None:
        # Reading the values would take a pass over the whole model.
        self._writes = [(entry.data_ptr(), _writes(entry)) for entry in method._state.params]
        self._data = _references(dataloader)

    def moved_since(self, last: End) -> bool:
        """Whether a parameter was written since, but for writes to its `.data`."""
        return self._writes != last._writes

    def has_data_of(self, last: End) -> bool:
        """Whether the same data was given, or none both times."""
        if self._data is None or last._data is None or len(self._data) != len(last._data):
            return False
        pairs = zip(self._data, last._data, strict=True)
        return all(mine() is not None and mine() is other() for mine, other in pairs)


def warn_of_omissions(method: Method, end: End) -> None:
    """Say what was left out in the task that `consolidate`, which calls this, is to end."""
    for message in _omissions(method, end):
        warnings.warn(f"clext: {message}", stacklevel=3)


def keep_end(method: Method, end: End) -> None:
    """The task has ended; a new one begins, in which nothing was called yet."""
    _ends[method] = end
    for part in method.parts:
        part._was_used = part._has_made_loss = part._has_pulled = False


def _omissions(method: Method, end: End) -> list[str]:
    last, learner = _ends.get(method), method._learner
    used = any(part._was_used or part._has_made_loss for part in method.parts)
    if last is not None and not used and not end.moved_since(last) and end.has_data_of(last):
        return [
            f"consolidate() of this {method.label} ends the task that the last call has ended "
            "already: since then no parameter was written and the data is the same; call it once "
            "for each task, or the task counts twice"
        ]
    found = []
    if learner.keeps_by_loss and learner.tasks > 0 and not learner._has_made_loss:
        found.append(
            f"loss() of this {method.label} was not called in this task, so {learner.name} kept "
            "nothing of the tasks before; train on loss(x, y) of the method, in place of a loss "
            "of your own"
        )
    if last is not None and end.moved_since(last) and _was_let_go(method):
        found.append(
            f"nothing of this {method.name} was in the steps of this task, so they went on as "
            "without it: give it to an optimizer of clext.optim, or call add_penalty_grad_() "
            "before optimizer.step()"
            + (", or add penalty() to the loss" if method.state_names else "")
        )
    return found


def _was_let_go(method: Method) -> bool:
    """Whether past tasks left something to hold, and nothing of the method held it."""
    return (
        method.keeps_by_pull
        and not (method._has_pulled or method._is_held_unseen)
        and method._has_something_to_hold()
    )


def _writes(parameter: Tensor) -> int:
    """How often it was written; torch does not count for tensors made in inference mode."""
    return 0 if parameter.is_inference() else parameter._version


def _references(dataloader: object) -> tuple[weakref.ref[object], ...] | None:
    """To the loader, or to what is in the first batch of a list; None where that cannot be."""
    if dataloader is None:
        return ()
    # A list cannot be referred to, and to keep it would keep the data in memory.
    entries: object = dataloader
    while isinstance(entries, list | tuple) and entries and isinstance(entries[0], list | tuple):
        entries = entries[0]
    if not isinstance(entries, list | tuple):
        entries = (entries,)
    try:
        return tuple(weakref.ref(entry) for entry in entries)
    except TypeError:
        return None
