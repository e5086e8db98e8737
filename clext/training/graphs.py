"""Steps as replays of one that was recorded as a CUDA graph.

A small model's step is dozens of kernels that take less time than launching them, so one step, from
the gathering of the batch to the optimizer, is recorded and replayed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from clext.methods import Method
from clext.methods.base import Examples
from clext.ops.plan import has_kernels
from clext.training.optimizers import TaskOptimizer
from clext.training.steps import Function, TaskSteps, explained

# Before a capture everything must have run once: lazily made handles, workspaces and optimizer
# state cannot be made inside. Three is what torch's own documentation recommends.
WARM_UP_STEPS = 3


# Runs in several threads share the streams below, torch's warnings, and its one capture at a time.
_one_at_a_time = threading.Lock()


class Recording:
    """A function that is launched at first, then recorded as a CUDA graph and replayed.

    The first calls are the same function, launched. One that waits for the device in them (a model
    that reads its own results, say), or cannot be recorded for another reason, is launched always,
    with a warning.

    Args:
        function: launches work on the device, all that changes from call to call lies there.
        device: of that work.
        undo: called after a recording that failed.
        capture: turns a function into one that replays the work it launched.
        watch: makes a context that gives a list, which afterwards has a line for each time that
            something inside has waited.
    """

    def __init__(
        self,
        function: Function,
        device: torch.device,
        undo: Function,
        *,
        capture: Callable[[Function], Function] | None = None,
        watch: Callable[[], AbstractContextManager[list[str]]] | None = None,
    ) -> None:
        self._function, self._device, self._undo = function, device, undo
        self._capture = capture or partial(capture_graph, device=device)
        self._watch = watch or partial(waits_for, device)
        self._replay: Function | None = None
        self._warm = 0  # calls before the recording

    def __call__(self) -> None:
        """Launched, recorded or replayed."""
        if self._replay is None:
            with _one_at_a_time:
                self._prepare()
        else:
            self._replay()

    def _prepare(self) -> None:
        """A call before there is what replays it, or the recording and its first replay."""
        if self._warm == WARM_UP_STEPS:
            try:
                self._replay = self._capture(self._function)
            except RuntimeError as error:
                self._launch_all(next(iter(str(error).splitlines()), type(error).__name__))
                self._undo()
            assert self._replay is not None
            self._replay()
            return
        self._warm += 1
        with side_stream(self._device), self._watch() as waits:
            self._function()
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
        self._replay = self._function


class GraphedSteps(TaskSteps):
    """Whole batches as replays of one recorded step, the rest launched by the host.

    The recorded step finds its batch by a position that it advances itself, so a replay needs
    nothing from the host. What Python does in a step (draws of `random`, counts) is in a recorded
    one what it was at its recording. The last, smaller batch of an epoch is launched: beside the
    memory of the graph that takes another step's, at most.

    `recording` makes the recording of a step: `Recording`, with its further arguments.
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
        recording: Callable[[Function, torch.device, Function], Recording] = Recording,
    ) -> None:
        super().__init__(method, optimizer, examples, batch_size, precision, iterations)
        self.recording = recording
        self._recorded = recording(self.step_at_position, self.device, optimizer.zero_grad)
        # What the recorded step reads and writes lies here, in memory that stays.
        self._batches: Tensor | None = None
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)

    def train_on(self, order: Tensor, step_done: Function, first: int = 0) -> Tensor:
        """As in TaskSteps. The losses are overwritten by the next epoch, of as many examples."""
        whole = self.begin_epoch(order, first)
        for _ in range(first, whole):
            self._recorded()
            self.replayed(step_done)
        self.launch(range(max(first, whole), len(self.losses)), order, step_done)
        return self.losses[first:]

    def begin_epoch(self, order: Tensor, first: int = 0) -> int:
        """Put the order where the recorded step finds it; the number of whole batches in it."""
        whole = len(order) // self.batch_size
        batches = order[: whole * self.batch_size].view(whole, self.batch_size)
        if self._batches is None:
            self._batches, self.losses = torch.empty_like(batches), self.empty_losses(len(order))
        self._batches.copy_(batches)
        self._position.fill_(first)
        return whole

    def replayed(self, step_done: Function) -> None:
        """What the host has to do after a recorded step."""
        self.optimizer.after_replay()
        self.optimizer.step_done()
        step_done()

    def step_at_position(self) -> None:
        """The step that is recorded: everything that changes from step to step is on the device."""
        assert self._batches is not None
        rows = self._batches.index_select(0, self._position).view(-1)
        loss = self.backward(rows)
        self.optimizer.launch()
        self.optimizer.zero_grad()
        value = (loss + self.optimizer.penalty).to(self.losses.dtype)
        self.losses.index_copy_(0, self._position, value.view(1))
        self._position += 1


class StepsTogether:
    """Steps of several runs, in one recording: on CUDA they run beside each other.

    A small model leaves most of a GPU idle. Each run has its own model, method and optimizer, and
    in the graph a branch; its bits are those that it has alone.
    """

    def __init__(self, runs: Sequence[GraphedSteps]) -> None:
        self.runs = runs
        self._recorded = runs[0].recording(self._step_of_each, runs[0].device, self._undo)

    def train_on(self, orders: Sequence[Tensor], steps_done: Sequence[Function]) -> list[Tensor]:
        """An epoch of each run on its order; their losses, see `GraphedSteps.train_on`."""
        whole = min(run.begin_epoch(order) for run, order in zip(self.runs, orders, strict=True))
        for _ in range(whole):
            self._recorded()
            for run, step_done in zip(self.runs, steps_done, strict=True):
                run.replayed(step_done)
        for run, order, step_done in zip(self.runs, orders, steps_done, strict=True):
            with explained(len(order), run.batch_size):
                run.launch(range(whole, len(run.losses)), order, step_done)
        return [run.losses for run in self.runs]

    def _step_of_each(self) -> None:
        beside_each_other([run.step_at_position for run in self.runs], self.runs[0].device)

    def _undo(self) -> None:
        for run in self.runs:
            run.optimizer.zero_grad()


_streams: dict[tuple[torch.device, int], torch.cuda.Stream] = {}


def own_stream(device: torch.device, number: int = 0) -> torch.cuda.Stream:
    """The stream of that number: every further one keeps a workspace of cuBLAS for itself."""
    if (device, number) not in _streams:
        _streams[device, number] = torch.cuda.Stream(device)
    return _streams[device, number]


def beside_each_other(functions: Sequence[Function], device: torch.device) -> None:
    """Call each; on CUDA each on a stream of its own, after what was before and before what comes.

    Their work runs at the same time, in the capture of a graph as branches of it.
    """
    if device.type != "cuda":
        for function in functions:
            function()
        return
    outer = torch.cuda.current_stream(device)
    # torch has 32 streams a device, and the first of ours is for what is around this.
    streams = [own_stream(device, 1 + number % 31) for number in range(len(functions))]
    for stream in streams:
        stream.wait_stream(outer)
    try:
        for stream, function in zip(streams, functions, strict=True):
            with torch.cuda.stream(stream):
                function()
    finally:  # else a capture could not end, and would say that instead of what happened
        for stream in streams:
            outer.wait_stream(stream)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work inside goes to a stream of its own on CUDA, as a warm-up before a capture has to."""
    if device.type != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(device), own_stream(device)
    own.wait_stream(outer)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
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
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns, once, that it is a prototype
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    for entry in caught:
        if "synchronizing CUDA operation" in str(entry.message):
            waits.append(f"{Path(entry.filename).name}:{entry.lineno} waits for the device")
        elif "Synchronization debug mode is a prototype" not in str(entry.message):
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
    records = can_record(method, examples[0].device) and optimizer.capturable
    return GraphedSteps if records else TaskSteps


def can_record(method: Method, device: torch.device) -> bool:
    """Whether a step of the method can be recorded there, if its optimizer's can."""
    on_cuda = device.type == "cuda" and has_kernels(device)
    return on_cuda and method.fused is not None and method.capturable
