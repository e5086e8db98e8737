"""What methods share that keep some examples of each task and project the gradient by them."""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext.core.checks import integer
from clext.core.modes import buffers_kept
from clext.core.parameters import allocate_rows
from clext.methods.parts.examples import check_alike, read_examples
from clext.methods.parts.sampling import Sampling
from clext.methods.unpenalised import Unpenalised
from clext.ops.kernels import gradient_gram, project_gradient_

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from clext.importance.passes import Batches
    from clext.methods.stateful import Commit


class Episodic(Unpenalised):
    """Base of methods that keep examples of past tasks, and change the gradient by theirs.

    At the end of a task `per_task` of its examples are drawn at random; with them go labels that
    count from the model's first output. `add_penalty_grad_` then changes `.grad`, which has to be
    complete and unscaled by that time; parameters without a gradient are left out, as by any
    optimizer. `penalty()` is zero: without `add_penalty_grad_` or an optimizer of `clext.optim`
    nothing is projected.

    A subclass makes the gradients of the past in `_write_rows`, as many as `_row_count` says, and
    says in `_weights` how much of each is added, from the matrix of all products.
    """

    keeps_by_pull: ClassVar[bool] = True
    runs_model_in_step: ClassVar[bool] = True
    memory: ClassVar[dict[str, str]] = {"examples": "T*min(M, N)*(4*X + 8)"}

    def __init__(
        self, model: nn.Module, *, strength: float | None, per_task: int, seed: int
    ) -> None:
        super().__init__(model, strength=strength)
        self.per_task = integer(self.name, "per_task", per_task, minimum=1)
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self._inputs: Tensor | None = None  # of all tasks, one after the other
        self._labels: Tensor | None = None
        self._sizes: list[int] = []  # how many of each task
        self._rows: list[Tensor] = []  # for each parameter its gradients of the past
        self._rows_for: tuple[object, ...] = ()  # what they were made for
        self._sampling = Sampling(self.seed)

    # ------------------------------------------------------------------ at a step

    def add_penalty_grad_(self) -> Tensor:
        """Project `.grad`, from the second task on; returns zero (0-dim).

        Call it after the last backward pass (and after `scaler.unscale_`), before any clipping.
        """
        self._note_pull()
        if self._sizes:
            try:
                self._project_()
            except (TypeError, ValueError) as error:
                raise self._explained(error) from None
        return self.penalty()

    @torch.no_grad()
    def _project_(self) -> None:
        params, count = self._state.params, self._row_count()
        needed = (count, params[0].dtype, params[0].device, [entry.shape for entry in params])
        if self._rows_for != needed:
            self._rows = []  # given back first
            self._rows, self._rows_for = [allocate_rows(entry, count) for entry in params], needed
        moving = [entry.requires_grad and entry.grad is not None for entry in params]
        chosen, rows = list(compress(params, moving)), list(compress(self._rows, moving))
        grads = [entry.grad for entry in chosen if entry.grad is not None]
        if not grads:
            return
        with torch.enable_grad(), buffers_kept(self.model):
            self._write_rows(rows, chosen)
        weights = self._weights(gradient_gram(rows, grads))
        if weights is not None:
            project_gradient_(grads, rows, weights)

    def _held(self) -> list[bool]:
        return [bool(self._sizes)] * len(self._state.params)

    def _row_count(self) -> int:
        """How many gradients of the past a step makes."""
        raise NotImplementedError

    def _write_rows(self, rows: list[Tensor], params: list[Tensor]) -> None:
        """Write gradient k of parameter i to rows[i][k], for all of them."""
        raise NotImplementedError

    def _write_row(
        self, rows: list[Tensor], k: int, params: list[Tensor], inputs: Tensor, labels: Tensor
    ) -> None:
        """The gradient of the mean loss of these examples, zero where a parameter has no part."""
        loss = self.outputs.cross_entropy(inputs, labels)
        with torch.autocast(inputs.device.type, enabled=False):  # for the forward pass alone
            grads = torch.autograd.grad(loss, params, materialize_grads=True)
        with torch.no_grad():
            torch._foreach_copy_([entry[k] for entry in rows], list(grads))

    def _weights(self, gram: Tensor) -> Tensor | None:
        """How much of each row to add to the gradient, float64 [rows]; None for nothing.

        `gram` has the products of all rows and, last, the gradient: float64 [rows + 1, rows + 1].
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ the memory

    def _kept_examples(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of all tasks, one task after the other."""
        assert self._inputs is not None
        assert self._labels is not None
        return self._inputs, self._labels

    def _kept_tasks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and labels of each task."""
        inputs, labels = self._kept_examples()
        return zip(inputs.split(self._sizes), labels.split(self._sizes), strict=True)

    def _end_task(self, dataloader: Batches | None) -> None:
        """Draw the examples to keep, uniformly: those with the largest of random keys."""
        device = self._state.params[0].device
        # On a copy: what fails below has drawn nothing.
        drawing = Sampling.load(self.name, self.seed, self._sampling.state_dict(), device)
        random = drawing.on(device)
        chosen: tuple[Tensor, ...] | None = None
        for x, y in read_examples(self, dataloader):
            known = self._inputs if chosen is None else chosen[0]
            if known is not None:
                check_alike(self.name, x, known, "in the memory")
            keys = torch.rand(len(x), dtype=torch.float64, generator=random, device=device)
            pool: tuple[Tensor, ...] = (x.detach(), y, keys)
            if chosen is not None:
                pool = tuple(torch.cat(pair) for pair in zip(chosen, pool, strict=True))
            best = pool[2].topk(min(self.per_task, len(pool[2]))).indices
            chosen = tuple(entry[best] for entry in pool)
        assert chosen is not None  # read_examples gives at least one batch
        inputs, labels, _ = chosen
        self._sizes = [*self._sizes, len(labels)]
        if self._inputs is not None and self._labels is not None:
            inputs, labels = torch.cat([self._inputs, inputs]), torch.cat([self._labels, labels])
        self._inputs, self._labels, self._sampling = inputs, labels, drawing

    # ------------------------------------------------------------------ state

    def _extra_state(self) -> dict[str, Any]:
        if not self._sizes:
            return {}
        inputs, labels = self._kept_examples()
        return {
            "inputs": inputs.clone(),
            "labels": labels.clone(),
            "sizes": list(self._sizes),
            "random": self._sampling.state_dict(),
        }

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        device = self._state.params[0].device
        inputs, labels, sizes = _checked_memory(self.name, extra)
        owner = f"{self.name}: state_dict['extra']['random']"
        sampling = Sampling.load(owner, self.seed, extra.get("random", {}), device)

        def commit() -> None:
            self._inputs = None if inputs is None else inputs.to(device, copy=True)
            self._labels = None if labels is None else labels.to(device, copy=True)
            self._sizes, self._sampling = sizes, sampling

        return commit

    def _move_extra_state(self, device: torch.device) -> None:
        if self._sizes:
            self._inputs, self._labels = (entry.to(device) for entry in self._kept_examples())


def _checked_memory(
    name: str, extra: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """What `_extra_state` returned; ValueError if it is not."""
    owner = f"{name}: state_dict['extra']"
    if not extra:
        return None, None, []
    expected = ("inputs", "labels", "sizes", "random")
    if set(extra) != set(expected):
        raise ValueError(f"{owner} holds {', '.join(extra)}, expected {', '.join(expected)}")
    inputs, labels, sizes = extra["inputs"], extra["labels"], extra["sizes"]
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"{owner}['sizes'] is {sizes!r}, expected a list of integers > 0")
    sizes = list(sizes)
    for key, entry in (("inputs", inputs), ("labels", labels)):
        if not isinstance(entry, Tensor) or entry.dim() == 0 or len(entry) != sum(sizes):
            got = list(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(f"{owner}[{key!r}] is {got}, expected {sum(sizes)} examples")
    if labels.dtype != torch.int64 or labels.dim() != 1 or bool((labels < 0).any()):
        raise ValueError(
            f"{owner}['labels'] is {labels.dtype} of shape {list(labels.shape)}, expected int64 "
            f"[{sum(sizes)}], none below 0"
        )
    if inputs.is_floating_point() and not bool(inputs.isfinite().all()):
        raise ValueError(f"{owner}['inputs'] holds NaN or infinity")
    return inputs, labels, sizes
