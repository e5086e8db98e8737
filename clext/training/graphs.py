"""Steps as replays of one that was recorded as a CUDA graph.

A small model's step is dozens of kernels that take less time than launching them, so one step, from
the gathering of the batch to the optimizer, is recorded and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from clext.methods import Method
from clext.methods.base import Examples
from clext.ops.plan import has_kernels
from clext.training.optimizers import TaskOptimizer
from clext.training.steps import Function, TaskSteps

# Before a capture everything must have run once: lazily made handles, workspaces and optimizer
# state cannot be made inside. Three is what torch's own documentation recommends.
WARM_UP_STEPS = 3


class GraphedSteps(TaskSteps):
    """Whole batches as replays of one recorded step, the rest launched by the host.

    The recorded step finds its batch by a position that it advances itself, so a replay needs
    nothing from the host. The first steps are the same function, launched. A model that waits for
    the device in them (it reads its own results, say), or cannot be recorded for another reason, is
    trained without, with a warning. What Python does in a step (draws of `random`, counts) is in a
    recorded one what it was at its recording.

    `capture` turns a function into one that replays the work it launched; `watch` makes a context
    that gives a list, which afterwards has a line for each time that something inside has waited.
    """

    def __init__(
        self,
        method: Method,
        optimizer: TaskOptimizer,
        examples: Examples,
        batch_size: int,
        precision: str,
        iterations: int | None = None,
        *,
        capture: Callable[[Function], Function] | None = None,
        watch: Callable[[], AbstractContextManager[list[str]]] | None = None,
    ) -> None:
        super().__init__(method, optimizer, examples, batch_size, precision, iterations)
        self._capture = capture or partial(capture_graph, device=self.device)
        self._watch = watch or partial(waits_for, self.device)
        self._replay: Function | None = None
        # What the recorded step reads and writes lies here, in memory that stays.
        self._batches: Tensor | None = None
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._warm = 0  # steps taken before the capture

    def train_on(self, order: Tensor, step_done: Function, first: int = 0) -> Tensor:
        """As in TaskSteps. The losses are overwritten by the next epoch, of as many examples."""
        whole = len(order) // self.batch_size
        batches = order[: whole * self.batch_size].view(whole, self.batch_size)
        if self._batches is None:
            self._batches, self.losses = torch.empty_like(batches), self.empty_losses(len(order))
        self._batches.copy_(batches)
        self._position.fill_(first)
        for _ in range(first, whole):
            self._one_step()
            self.optimizer.after_replay()
            self.optimizer.step_done()
            step_done()
        self.launch(range(max(first, whole), len(self.losses)), order, step_done)
        return self.losses[first:]

    def _one_step(self) -> None:
        """The step at the position: launched, recorded or replayed."""
        if self._replay is None and self._warm == WARM_UP_STEPS:
            try:
                self._replay = self._capture(self._step_at_position)
            except RuntimeError as error:
                self._launch_all(next(iter(str(error).splitlines()), type(error).__name__))
                self.optimizer.zero_grad()  # what it got to before it failed
        if self._replay is not None:
            self._replay()
            return
        self._warm += 1
        with side_stream(self.device), self._watch() as waits:
            self._step_at_position()
        # Before the last of them much is made that is there later.
        if waits and self._warm == WARM_UP_STEPS:
            self._launch_all(f"{waits[0]}, as item() and cpu() do")

    def _launch_all(self, reason: str) -> None:
        """Record nothing, and say why."""
        warnings.warn(
            f"clext: a step of this model cannot be recorded as a CUDA graph ({reason}); its "
            "kernels are launched one by one, which is slower",
            stacklevel=2,
        )
        self._replay = self._step_at_position

    def _step_at_position(self) -> None:
        """The step that is recorded: everything that changes from step to step is on the device."""
        assert self._batches is not None
        rows = self._batches.index_select(0, self._position).view(-1)
        loss = self.backward(rows)
        self.optimizer.launch()
        self.optimizer.zero_grad()
        value = (loss + self.optimizer.penalty).to(self.losses.dtype)
        self.losses.index_copy_(0, self._position, value.view(1))
        self._position += 1


@cache
def own_stream(device: torch.device) -> torch.cuda.Stream:
    """One for each device: every further one would keep a workspace of cuBLAS for itself."""
    return torch.cuda.Stream(device)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work inside goes to a stream of its own on CUDA, as a warm-up before a capture has to."""
    if device.type != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(device), own_stream(device)
    own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    outer.wait_stream(own)


@contextmanager
def waits_for(device: torch.device) -> Iterator[list[str]]:
    """A list of the times that the host waits for a CUDA device inside, which no capture can have.

    It is filled at the end. torch warns of them; other warnings go on.
    """
    waits: list[str] = []
    if device.type != "cuda":
        yield waits
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for entry in caught:
        if "synchronizing CUDA operation" in str(entry.message):
            waits.append(f"{Path(entry.filename).name}:{entry.lineno} waits for the device")
        else:
            warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)


def capture_graph(function: Function, device: torch.device) -> Function:
    """Record the work that `function` launches on a CUDA device; returns what launches it again.

    RuntimeError where that cannot be: stream and random state are then what they were, which torch
    leaves as they are in a capture whose end fails.
    """
    graph = torch.cuda.CUDAGraph()
    index = torch.cuda.current_device() if device.index is None else device.index
    random = torch.cuda.default_generators[index]
    before = random.get_state()
    try:
        # Only this thread's calls count: another one (a data loader's, say) may allocate meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, stream=own_stream(device), capture_error_mode="thread_local"),
        ):
            function()
    except RuntimeError:
        # The generator's state still counts as one in a capture: it gets another.
        fresh = torch.Generator(device)
        fresh.set_state(before)
        random.graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph.replay


def graphed_or_not(method: Method, optimizer: TaskOptimizer, examples: Examples) -> type[TaskSteps]:
    """Graphed steps where CUDA, clext's kernels for it, and the method allow it."""
    device = examples[0].device
    capturable = method.fused is not None and method.capturable and optimizer.capturable
    on_cuda = device.type == "cuda" and has_kernels(device)
    return GraphedSteps if on_cuda and capturable else TaskSteps
