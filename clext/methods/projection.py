"""Gradient projection: examples of each task are kept, and their gradients correct each step's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clext.core.batches import check_alike
from clext.core.checks import integer
from clext.core.inputs import concatenated, mapped, rows, split, taken
from clext.core.likelihood import IGNORED
from clext.core.modes import buffers_kept, without_checkpointing
from clext.core.parameters import allocate_rows, device_of
from clext.core.processes import ALONE, apart
from clext.core.seeding import generator, restored
from clext.methods.base import Method
from clext.methods.parts.options import scale_of
from clext.ops.kernels import gradient_gram, project_gradient_

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.processes import Processes
    from clext.core.supervision import SupervisionOptions


def _counting(labels: Tensor) -> Tensor:
    """How many of them a mean loss is over."""
    return (labels != IGNORED).sum()


class GradientProjection(Method):
    """Methods that keep examples of past tasks, and change the gradient by theirs.

    At the end of a task `per_task` of its examples are drawn at random; with them go labels that
    count from the model's first output. `add_penalty_grad_` then changes `.grad`, which has to be
    complete by that time; parameters without a gradient are left out, as by any optimizer.
    `penalty()` is zero: without `add_penalty_grad_` nothing is projected.

    A subclass makes the gradients of the past in `_write_rows`, as many as `_row_count` says, and
    says in `_weights` how much of each is added, from the matrix of all products.
    """

    has_penalty: ClassVar[bool] = True
    runs_model: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True
    fused: tuple[str, ...] | None = None

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None,
        per_task: int,
        seed: int,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, **supervision)
        self.per_task = integer(self.name, "per_task", per_task, minimum=1)
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self._examples: tuple[Any, ...] = ()  # inputs and labels, one task after the other
        self._sizes: list[int] = []  # how many of each task
        self._random = generator(self.seed)
        self._rows: list[Tensor] = []  # for each parameter its gradients of the past
        self._rows_for: tuple[object, ...] = ()  # what they were made for

    # ------------------------------------------------------------------ at a step

    @torch.no_grad()
    def add_penalty_grad_(self, scaler: object = None) -> Tensor:
        """Project `.grad`, from the second task on; returns zero (0-dim).

        Call it after the last backward pass, before any clipping.
        `scaler`: the GradScaler (or factor) by which they are scaled still; none after `unscale_`.
        """
        self.steps += 1
        params = [entry for entry in self.model.parameters() if entry.grad is not None]
        params = [entry for entry in params if entry.requires_grad]
        grads = [entry.grad for entry in params if entry.grad is not None]
        if not self._sizes or not grads:
            return self.penalty()
        rows = self._rows_of(params)
        processes = self.heads.processes
        if processes.groups and any(isinstance(m, _BatchNorm) for m in self.model.modules()):
            processes = ALONE  # statistics of a batch are those of all its examples
        with (
            torch.enable_grad(),
            buffers_kept(self.model),
            without_checkpointing(),
            apart(self.model),
        ):
            self._write_rows(rows, params, processes)
        processes.sum_(rows)
        # Where g is scale times the gradient, so is what is added to it.
        scale = scale_of(scaler)
        gram = gradient_gram(rows, grads)
        gram[:, -1] /= scale
        weights = self._weights(gram)
        if weights is not None:
            project_gradient_(grads, rows, weights * scale)
        return self.penalty()

    def _rows_of(self, params: list[nn.Parameter]) -> list[Tensor]:
        """Room for the gradients of the past, the same as at the last step if that fits."""
        count = self._row_count()
        needed = (count, [(entry.shape, entry.dtype, entry.device) for entry in params])
        if self._rows_for != needed:
            self._rows = []  # given back first
            self._rows, self._rows_for = [allocate_rows(entry, count) for entry in params], needed
        return self._rows

    def _row_count(self) -> int:
        """How many gradients of the past a step makes."""
        raise NotImplementedError

    def _write_rows(
        self, rows: list[Tensor], params: list[nn.Parameter], processes: Processes
    ) -> None:
        """Write gradient k of parameter i to rows[i][k], for all of them.

        Of several processes each writes the part of its own share of the examples.
        """
        raise NotImplementedError

    def _write_row(
        self,
        rows: list[Tensor],
        k: int,
        params: list[nn.Parameter],
        examples: tuple[Inputs, Tensor],
        processes: Processes,
    ) -> None:
        """The gradient of the mean loss of these examples, zero where a parameter has no part."""
        inputs, labels = examples
        if processes.groups:
            inputs, labels = taken(examples, slice(processes.rank, None, processes.size))
            if len(labels) == 0:
                torch._foreach_zero_([entry[k] for entry in rows])
                return
        loss = self.heads.loss_over_tasks(inputs, labels)
        if processes.groups:
            loss = loss * (_counting(labels) / _counting(examples[1]))
        with torch.autocast(labels.device.type, enabled=False):  # for the forward pass alone
            grads = torch.autograd.grad(loss, params, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_copy_([entry[k] for entry in rows], list(grads))

    def _weights(self, gram: Tensor) -> Tensor | None:
        """How much of each row to add to the gradient, float64 [rows]; None for nothing.

        `gram` has the products of all rows with each other and, last, with the gradient: float64
        [rows + 1, rows + 1], of which the last row is of no use.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ the examples

    def _kept_tasks(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Inputs and labels of each task."""
        return iter(split(self._examples, self._sizes))

    def _follow_model(self) -> None:
        device = device_of(self.model)
        self._examples = mapped(lambda entry: entry.to(device), self._examples)

    def _end_task(self, dataloader: Batches | None) -> None:
        """Draw the examples to keep, uniformly: those with the largest of random keys."""
        random = copy.deepcopy(self._random)  # what fails below has drawn nothing
        processes = self.heads.processes
        draws = processes.own_generator(random)
        chosen: tuple[Any, ...] = ()
        with processes.together():
            for x, y in self.heads.read_examples(self.name, dataloader, self.tasks):
                for known in (chosen or self._examples)[:1]:
                    check_alike(self.name, x, known, "in the memory")
                keys = torch.rand(len(y), dtype=torch.float64, generator=draws).to(y.device)
                chosen = self._best([chosen, (x, y, keys)] if chosen else [(x, y, keys)])
        if processes.groups:
            chosen = self._best([own for own in processes.gathered_rows(chosen) if own])
        new = mapped(lambda entry: entry.to(device_of(self.model)), chosen[:2])
        if self._examples:
            new = concatenated([self._examples, new])
        self._examples, self._random = new, random
        self._sizes = [*self._sizes, len(chosen[1])]

    def _best(self, pools: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Those with the largest keys, as many as are kept of a task."""
        pool = concatenated(pools) if len(pools) > 1 else pools[0]
        best = pool[2].topk(min(self.per_task, len(pool[2]))).indices
        found: tuple[Any, ...] = taken(pool, best)
        return found

    # ------------------------------------------------------------------ state

    def _save(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"random": self._random.get_state(), "sizes": list(self._sizes)}
        for name, entry in zip(("inputs", "labels"), self._examples, strict=False):
            extra[name] = mapped(Tensor.clone, entry)
        return {"extra": extra}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        extra, device = state["extra"], device_of(self.model)
        names = ("inputs", "labels") if extra.get("sizes") else ()
        self._examples = tuple(
            mapped(lambda entry: entry.to(device, copy=True), extra[name]) for name in names
        )
        self._sizes = list(extra.get("sizes", ()))
        if names and rows(self._examples[0]) != sum(self._sizes):
            raise ValueError(f"it has {rows(self._examples[0])} examples, expected {self._sizes}")
        self._random = restored(self.seed, extra.get("random"))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": [], "_rows_for": ()}
