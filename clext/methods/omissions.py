"""What a training loop has left out, where it shows at the end of a task.

A warning that is wrong once is not read again, so nothing is said where another loop could have
meant it: only what was called, whether parameters have changed and which data was given count.
"""

from __future__ import annotations

import warnings
import weakref
from itertools import repeat
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

    from clext.methods.base import Method

_SAMPLES = 256  # of a parameter

# Of the task that ended last. Not in the method itself: a copy of it, or a pickle, knows of no end.
_ends: WeakKeyDictionary[Method, End] = WeakKeyDictionary()


class End:
    """The end of a task: the parameters as they are, and the data that was given.

    Args:
        method: ends it.
        dataloader: that of `consolidate`, before anything is read from it.
        unseen: names of parameters that came into the model since the method last looked at it.
    """

    def __init__(self, method: Method, dataloader: object, unseen: list[str]) -> None:
        self.unseen = unseen
        # Not the count of writes, which torch's fused optimizers do not keep.
        self._samples = [_sample(entry) for entry in method._state.params]
        self._data = _references(dataloader)

    def moved_since(self, last: End, counts: Iterable[bool] = repeat(True)) -> bool:
        """Whether a parameter that counts has changed."""
        if len(self._samples) != len(last._samples):
            return True
        pairs = zip(self._samples, last._samples, counts, strict=False)
        return any(counted and not _same(mine, other) for mine, other, counted in pairs)

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
    moved = last is not None and end.moved_since(last)
    if last is not None and not (used or moved) and end.has_data_of(last):
        return [
            f"consolidate() of this {method.label} ends the task that the last call has ended "
            "already: since then no parameter has changed and the data is the same; call it once "
            "for each task, or the task counts twice"
        ]
    found = []
    if learner.keeps_by_loss and moved and not learner._has_made_loss:
        found.append(
            f"loss() of this {method.label} was not called in this task, so {learner.name} kept "
            "nothing of the tasks before; train on loss(x, y) of the method, in place of a loss "
            "of your own"
        )
    if last is not None and moved and _was_let_go(method, end, last):
        found.append(
            f"nothing of this {method.name} was in the steps of this task, so they went on as "
            "without it: give it to an optimizer of clext.optim, or call add_penalty_grad_() "
            "before optimizer.step()"
            + (", or add penalty() to the loss" if method.state_names else "")
        )
    matters = method.keeps_by_pull and (method.tasks > 0 or "path" in method.state_names)
    if end.unseen and used and matters:
        more = f" (and {len(end.unseen) - 1} more)" if len(end.unseen) > 1 else ""
        found.append(
            f"parameter '{end.unseen[0]}'{more} came into the model after this {method.name} had "
            "last looked at it, so the steps since then were without it there; after a change of "
            "the model call begin_task() or refresh_parameters() before the first step"
        )
    return found


def _was_let_go(method: Method, end: End, last: End) -> bool:
    """Whether what past tasks left to hold has moved, and nothing of the method held it."""
    return (
        method.keeps_by_pull
        and not (method._has_pulled or method._is_held_unseen)
        and end.moved_since(last, method._held())
    )


def _sample(parameter: Tensor) -> Tensor:
    """Some of its numbers: a step changes them all, and to read all would take long."""
    flat = parameter.detach().as_strided((parameter.numel(),), (1,))
    return flat[:: max(1, len(flat) // _SAMPLES)].clone()


def _same(mine: Tensor, other: Tensor) -> bool:
    alike = (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
    return alike and torch.equal(mine, other)


def _references(dataloader: object) -> tuple[weakref.ref[object], ...] | None:
    """To the loader, or to what is in a list of batches; None where that cannot be."""
    if dataloader is None:
        return ()
    try:
        return tuple(weakref.ref(entry) for entry in _entries(dataloader))
    except TypeError:
        return None


def _entries(data: object) -> Iterator[object]:
    """What is in a list of batches: it cannot be referred to itself, and must not be kept."""
    if isinstance(data, list | tuple):
        for entry in data:
            yield from _entries(entry)
    else:
        yield data
