"""Which of a model's outputs count: those of the task, or of all tasks seen.

With a head for each task, and with a head that grows with the classes, a model has outputs that
take no part in the loss of a task. `Outputs` takes them out of what the model returns, so that a
loss, an importance or a prediction need not know of them.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterator

# Who selects outputs of a model now: two at once would each narrow what the other left.
_selecting: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Outputs]] = weakref.WeakKeyDictionary()


class Outputs:
    """The outputs of one model that are active now, and those of each task so far.

    While outputs are selected, the model returns the active ones alone, by a forward hook on it. (A
    copy of the model returns all of them.) Labels that go with such outputs are *local*: they count
    from the first active output. Labels of examples of several tasks are *global*: they count from
    the model's first output.

    Args:
        model: returns logits [N, outputs].
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._remove: weakref.finalize[[], Outputs] | None = None  # takes the hook away
        self._is_full = False
        self.active: range | None = None  # None: all that the model has
        self.blocks: list[range] = []  # of the tasks begun, in their order

    @property
    def start(self) -> int:
        """The first active output: global label = start + local label."""
        return 0 if self.active is None else self.active.start

    @property
    def seen(self) -> int | None:
        """How many outputs the tasks begun so far have; None where nobody said."""
        return max((block.stop for block in self.blocks), default=None)

    def begin_task(self, block: range | None, active: range | None, *, ended: int) -> None:
        """A task begins whose classes are the outputs `block`, competing with `active`.

        Begun once more, it takes the place of itself.

        Args:
            block: of the task; None: nothing is said of it.
            active: outputs that compete, `block` among them; None: all.
            ended: how many tasks have ended.

        Raises:
            ValueError: they are not such ranges; nothing is changed.
        """
        check_range("begin_task: block", block)
        check_range("begin_task: active", active)
        if active is not None:
            if block is None:
                raise ValueError(
                    f"begin_task: active={active} needs block, the outputs of the task itself"
                )
            if not (active.start <= block.start and block.stop <= active.stop):
                raise ValueError(
                    f"begin_task: block={block} is not within active={active}; the task's own "
                    "outputs are among those that compete"
                )
            if len(self.blocks) < ended:
                raise ValueError(
                    f"begin_task: of {ended} earlier tasks {len(self.blocks)} were begun with a "
                    "block; say it for all tasks, from the first"
                )
        self.select(active)
        if block is not None:
            known = self.blocks[:ended]
            self.blocks = [*known, *[block] * (ended - len(known)), block]

    def select(self, active: range | None) -> None:
        """Let the model return the outputs `active`; None for all of them, without a hook.

        Raises:
            ValueError: another method has selected outputs of this model; nothing is changed.
        """
        if active is not None:
            other = _selecting.get(self._model)
            if other is not None and other() not in (None, self):
                raise ValueError(
                    "the outputs of this model are selected by another method already: combine the "
                    "two (method.combine(other)), or let the other go back to all outputs with "
                    "begin_task()"
                )
            _selecting[self._model] = weakref.ref(self)
        elif self._remove is not None:
            self._remove()
            self._remove = None
            _selecting.pop(self._model, None)
        self.active = active
        if active is not None and self._remove is None:
            hook = self._model.register_forward_hook(_Narrow(self))
            # A method that is gone leaves the model as it was.
            self._remove = weakref.finalize(self, hook.remove)

    def logits(self, inputs: Tensor, labels: Tensor | None = None) -> Tensor:
        """What the model returns for `inputs`: logits [N, outputs], of the active outputs alone.

        Inside `full` of all.

        Args:
            inputs: of the model, N examples.
            labels: of the examples. Where all outputs are active it shows only now whether they are
                among these; on the CPU, where it is cheap, that is looked at.

        Raises:
            ValueError: the model returns something else, or has not so many outputs.
        """
        logits: Tensor = self._model(inputs)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(inputs):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"loss: the model returned {got} for {len(inputs)} examples, expected logits "
                f"[{len(inputs)}, outputs]; make the method of a module that returns these alone"
            )
        if labels is not None and self.active is None and (reach := _reach(labels)):
            low, high = reach
            if high >= logits.shape[1]:
                raise ValueError(
                    f"loss: labels reach from {low} to {high}, expected 0 to "
                    f"{logits.shape[1] - 1}: the model has {logits.shape[1]} outputs"
                )
        return logits

    def check_labels(self, labels: Tensor, *, local: bool = True) -> None:
        """ValueError for labels outside the active outputs; on the CPU, where it is cheap.

        On other devices torch's own loss stops the run.

        Args:
            labels: of a batch that is not empty.
            local: they count from the first active output; else from the model's first.
        """
        reach = _reach(labels)
        if reach is None:
            return
        low, high = reach
        if self.active is None:
            expected, end = "none below 0", None
        elif local:
            end = len(self.active)
            counted = f"they count from the first active output, {self.start}"
            expected = f"0 to {end - 1}: {counted}"
        else:
            end = max(self.active.stop, self.seen or 0)
            expected = f"0 to {end - 1}: they count from the model's first output"
        if low < 0 or (end is not None and high >= end):
            raise ValueError(f"loss: labels reach from {low} to {high}, expected {expected}")

    def check_labels_of_task(self, owner: str, labels: Tensor) -> None:
        """ValueError if labels, local, of the task begun last are not among its own outputs."""
        block = self.blocks[-1]
        low, high = int(labels.min()) + self.start, int(labels.max()) + self.start
        if low < block.start or high >= block.stop:
            raise ValueError(
                f"{owner}: labels reach from {low - self.start} to {high - self.start}, expected "
                f"{block.start - self.start} to {block.stop - 1 - self.start}: the task's own "
                f"outputs are {block}, and labels count from the first active output, {self.start}"
            )

    @contextmanager
    def selected(self, active: range | None) -> Iterator[None]:
        """The same for a while."""
        before = self.active
        self.select(active)
        try:
            yield
        finally:
            self.select(before)

    @contextmanager
    def full(self) -> Iterator[None]:
        """Inside, the model returns all its outputs."""
        before, self._is_full = self._is_full, True
        try:
            yield
        finally:
            self._is_full = before

    def cross_entropy(self, inputs: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
        """The mean loss of examples of any task seen.

        An example competes with the active outputs if its class is among them, else with those of
        its own task.

        Args:
            inputs: of the model, N examples.
            labels: global, int64 [N].
            reduction: "mean", or "none" for the loss of each, [N].
        """
        if not self.apart:
            local = labels - self.start
            return F.cross_entropy(self.logits(inputs, local), local, reduction=reduction)
        with self.full():
            logits = self.logits(inputs)
        rivals = self.competing(logits.shape[1], logits.device).index_select(0, labels)
        rivalling = logits.masked_fill(~rivals, -torch.inf)
        return F.cross_entropy(rivalling, labels, reduction=reduction)

    def competing(self, outputs: int, device: torch.device) -> Tensor:
        """Row l: with which of the model's `outputs` the class l competes; bool, square."""
        # A class of no task has no rivals, not even itself: its loss is NaN and not zero.
        rivals = torch.zeros(outputs, outputs, dtype=torch.bool, device=device)
        for block in [*self.blocks, self.active or range(outputs)]:
            rivals[block.start : block.stop, block.start : block.stop] = True
        return rivals

    @property
    def apart(self) -> bool:
        """Whether a task seen has outputs that are not active (a head for each task)."""
        active = self.active
        return active is not None and any(
            block.start < active.start or block.stop > active.stop for block in self.blocks
        )

    def narrow(self, logits: Tensor) -> Tensor | None:
        """The active outputs of what the model returned; None where all are to be returned."""
        active = self.active
        if self._is_full or active is None:
            return None
        self.check_logits(logits)
        return logits[:, active.start : active.stop]

    def check_width(self, owner: str, outputs: int, known: int) -> None:
        """ValueError if the model has not all the outputs that a method knows from before."""
        if outputs < known:
            raise ValueError(
                f"{owner}: the model has {outputs} outputs, and {known} when earlier tasks ended: "
                "a head may grow but not shrink; make a new method for this model"
            )

    def check_logits(self, logits: object) -> None:
        """ValueError if what the model returned in full has not all the active outputs."""
        active = self.active
        if active is not None and (
            not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < active.stop
        ):
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"outputs {active.start} to {active.stop - 1} are active, so the model must return "
                f"logits [N, >= {active.stop}], got {got}; say other outputs, or add them to it"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model, "active": self.active, "blocks": self.blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]
        self.blocks = state["blocks"]
        self.select(state["active"])


class _Narrow:
    """The forward hook: it keeps nothing alive, and a copy of the model is not narrowed by it."""

    def __init__(self, outputs: Outputs | None) -> None:
        self._outputs = None if outputs is None else weakref.ref(outputs)

    def __call__(self, _module: nn.Module, _inputs: object, logits: Tensor) -> Tensor | None:
        outputs = None if self._outputs is None else self._outputs()
        return None if outputs is None else outputs.narrow(logits)

    def __reduce__(self) -> tuple[type[_Narrow], tuple[None]]:
        return _Narrow, (None,)


def _reach(labels: Tensor) -> tuple[int, int] | None:
    """The lowest and the highest; None where a device had to be waited for, or there are none yet.

    There are none while a graph is traced, inside `torch.vmap`, or in a tensor that is not real.
    """
    if not labels.is_cpu or torch.compiler.is_compiling():
        return None
    low, high = labels.aminmax()
    try:
        return int(low), int(high)
    except RuntimeError:
        return None


def check_range(name: str, given: object) -> None:
    """ValueError unless it is a range of outputs, or None."""
    if given is None:
        return
    if not isinstance(given, range) or given.step != 1 or not 0 <= given.start < given.stop:
        raise ValueError(f"{name} must be a range of outputs, such as range(2, 4), got {given!r}")
