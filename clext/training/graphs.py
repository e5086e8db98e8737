"""Steps as replays of one that was recorded as a CUDA graph.

A small model's step is dozens of kernels that take less time than launching them, so one step, from
the gathering of the batch to the optimizer, is recorded and replayed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from clext.methods import Method
from clext.methods.base import Examples
from clext.training.optimizers import TaskOptimizer
from clext.training.steps import Function, TaskSteps

# Before a capture everything must have run once: lazily made handles, workspaces and optimizer
# state cannot be made inside. Three is what torch's own documentation recommends.
WARM_UP_STEPS = 3


class GraphedSteps(TaskSteps):
    """Whole batches as replays of one recorded step, the rest launched by the host.

    The recorded step finds its batch by a position that it advances itself, so a replay needs
    nothing from the host. `capture` turns a function into one that replays the work it launched; a
    model that cannot be captured (one that reads its own results, say) is trained without, with a
    warning.
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
    ) -> None:
        super().__init__(method, optimizer, examples, batch_size, precision, iterations)
        self._capture = capture or partial(capture_graph, device=self.device)
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
        # The first steps of the task, launched one by one.
        warm = range(first, max(first, min(whole, first + WARM_UP_STEPS - self._warm)))
        with side_stream(self.device):
            self.launch(warm, order, step_done)
        self._warm += len(warm)
        self._position.fill_(warm.stop)
        for _ in range(warm.stop, whole):
            self._recorded()()
            self.optimizer.after_replay()
            self.optimizer.step_done()
            step_done()
        self.launch(range(max(first, whole), len(self.losses)), order, step_done)
        return self.losses[first:]

    def _recorded(self) -> Function:
        """What replays the step; it is recorded when first asked for."""
        if self._replay is None:
            try:
                self._replay = self._capture(self._step_at_position)
            except RuntimeError as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                warnings.warn(
                    f"clext: a step of this model cannot be recorded as a CUDA graph ({reason}); "
                    "its kernels are launched one by one, which is slower",
                    stacklevel=2,
                )
                self.optimizer.zero_grad()  # what it got to before it failed
                self._replay = self._step_at_position
        return self._replay

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


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work inside goes to a stream of its own on CUDA, as a warm-up before a capture has to."""
    if device.type != "cuda":
        yield
        return
    outer, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    own.wait_stream(outer)
    with torch.cuda.stream(own):
        yield
    outer.wait_stream(own)


def capture_graph(function: Function, device: torch.device) -> Function:
    """Record the work that `function` launches on a CUDA device; returns what launches it again."""
    graph = torch.cuda.CUDAGraph()
    # A stream of this device: torch's own for captures is of the one that was first captured on.
    # Only this thread's calls count: another one (a data loader's, say) may allocate meanwhile.
    stream = torch.cuda.Stream(device)
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        function()
    return graph.replay


def graphed_or_not(method: Method, optimizer: TaskOptimizer, examples: Examples) -> type[TaskSteps]:
    """Graphed steps where CUDA and the method allow it."""
    capturable = method.fused is not None and method.capturable and optimizer.capturable
    return GraphedSteps if examples[0].is_cuda and capturable else TaskSteps
