"""The course's classes that measure importance on data, on top of earlier objects': `ewc`, `mas`,
`scp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext import ops
from clext.core.batches import read_batches
from clext.core.checks import integer
from clext.core.modes import module_mode
from clext.course.base import CourseMethod, Device, Tensors, brief

if TYPE_CHECKING:
    from collections.abc import Callable

    from clext.core.batches import Batches
    from clext.core.lists import TensorList

    Accumulate = Callable[[TensorList, TensorList, float], None]

Guards = Sequence[Mapping[str, Tensor] | None]


class Guarded(CourseMethod):
    """Importances measured on data, added to those of earlier objects."""

    p_old: Tensors
    _precision_matrices: Tensors

    def __init__(
        self, model: nn.Module, dataloader: Batches | None, device: Device, prev_guards: Guards
    ) -> None:
        super().__init__(model, dataloader, device)
        self._check_dataloader(dataloader)
        self._check_guards(prev_guards)
        self.previous_guards_list = prev_guards

    def _objective(self, output: Tensor, label: Tensor) -> Tensor:
        """What is differentiated: a number from a batch's outputs and its labels."""
        raise NotImplementedError

    def _sum_of_guards(self) -> Tensors:
        total = self._zeros()
        for guard in self.previous_guards_list:
            for key, entry in total.items() if guard else ():
                entry.add_(guard[key].to(entry))  # type: ignore[index]  # guard is not None here
        return total

    def _add_importance(self, total: Tensors, accumulate: Accumulate, weight: float = 1.0) -> None:
        """Add `weight` times the mean over batches, empty ones aside, and leave the model as the
        notebook does.
        """
        before = [p.grad for p in self.params.values()]
        try:
            with module_mode(self.model, training=False), torch.enable_grad():
                if self.dataloader is not None:
                    sums, batches = self._zeros(), 0
                    for x, y in read_batches(
                        self._owner, self.dataloader, torch.device(self.device)
                    ):
                        self.model.zero_grad()
                        self._objective(self.model(x), y).backward()
                        found = {k: p.grad for k, p in self._keyed().items() if p.grad is not None}
                        accumulate([sums[k] for k in found], list(found.values()), 1.0)
                        batches += 1
                    for key, entry in total.items():
                        entry.add_(sums[key], alpha=weight / batches)
        except BaseException:
            for p, grad in zip(self.params.values(), before, strict=True):
                p.grad = grad
            raise
        self.model.eval()

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self.p_old, self._precision_matrices

    # ------------------------------------------------------------------ checks

    def _check_dataloader(self, dataloader: object) -> None:
        if dataloader is not None and batch_count(dataloader) < 1:
            raise ValueError(
                f"{self._owner}: dataloader must be None (before the first task) or the DataLoader "
                "of the task that has ended, with a length and at least one batch, got "
                f"{brief(dataloader)}; {self._order}"
            )

    def _check_guards(self, guards: object) -> None:
        if not isinstance(guards, Sequence) or isinstance(guards, str):
            raise ValueError(
                f"{self._owner}: prev_guards must be a list of the _precision_matrices of earlier "
                f"objects, got {brief(guards)}; {self._order}"
            )
        for index, guard in enumerate(guards):
            label = f"{self._owner}: prev_guards[{index}]"
            if guard is None:
                continue
            if not isinstance(guard, Mapping):
                raise ValueError(
                    f"{label} must be the _precision_matrices of an earlier object, or None, got "
                    f"{brief(guard)}"
                )
            for key, p in self._keyed().items() if guard else ():
                entry = guard.get(key)
                if not isinstance(entry, Tensor):
                    raise ValueError(
                        f"{label} has no tensor '{key}', expected the _precision_matrices of a "
                        f"{self._owner} on this model"
                    )
                if entry.shape != p.shape:
                    raise ValueError(
                        f"{label}['{key}'] has shape {list(entry.shape)}, expected "
                        f"{list(p.shape)} as the parameter; take guards of this model only"
                    )
                if not bool(entry.isfinite().all()):
                    raise ValueError(
                        f"{label}['{key}'] holds NaN or infinity, which a diverged task has left: "
                        "leave that guard out"
                    )


def batch_count(dataloader: object) -> int:
    """How many batches `dataloader` says it has; 0 if it does not say."""
    if not isinstance(dataloader, Sized) or isinstance(dataloader, str | Mapping | Tensor):
        return 0
    try:
        return len(dataloader)
    except TypeError:  # a DataLoader over an IterableDataset
        return 0


class Measured(Guarded):
    """The importance of the task, as it is, on top of the guards: `ewc` and `mas`."""

    _accumulate: staticmethod[..., None] = staticmethod(ops.accumulate_square_)

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches | None,
        device: Device,
        prev_guards: Guards = (None,),
    ) -> None:
        super().__init__(model, dataloader, device, prev_guards)
        self._precision_matrices = self._sum_of_guards()
        self._add_importance(self._precision_matrices, self._accumulate)
        self.p_old = self._copies()


class ewc(Measured):  # noqa: N801  (the notebook's name)
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796), the course's way.

    Importance: squared gradient of the cross-entropy with the labels of the data. Departs from the
    paper by *batch mean*, *guards again* and *left behind* (see `clext.course`); `clext.EWC` does
    not.

    Args:
        model: from a batch of inputs to logits; its trainable parameters are protected.
        dataloader: of the task that has ended, batches of (x, y), with a length; None before the
            first task: then the importances are the sum of `prev_guards`.
        device: where x and y are moved to; the model has to be there.
        prev_guards: `_precision_matrices` of earlier objects; None entries are skipped.

    Attributes:
        params: the trainable parameters by name.
        p_old: their values when the object was made, the anchor.
        _precision_matrices: the importance of each; float64 for float64 parameters, else float32.
        previous_guards_list: `prev_guards`.

    Raises:
        ValueError: an argument is not as described; the model is as it was.
    """

    def _objective(self, output: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(output, label)


class mas(Measured):  # noqa: N801  (the notebook's name)
    """Memory Aware Synapses (Aljundi et al. 2018, arXiv:1711.09601), the course's way.

    Importance: absolute gradient of the squared norm of the outputs; labels are not looked at.
    Departs from the paper by *batch mean*, *guards again* and *left behind* (see `clext.course`);
    `clext.MAS` does not. The course leaves this importance to the student: a copy of the notebook
    in which it is missing has zeros for it and trains like the baseline.

    Arguments, attributes and errors are those of `ewc`.
    """

    _accumulate = staticmethod(ops.accumulate_abs_)

    def _objective(self, output: Tensor, label: Tensor) -> Tensor:  # noqa: ARG002
        return output.square().sum(dim=1).mean()


class scp(Guarded):  # noqa: N801  (the notebook's name)
    """Sliced Cramer Preservation (Kolouri et al. 2020, ICLR), the course's way.

    Importance: squared gradient of xi . f, f the mean output of a batch and xi the mean of `L`
    directions that numpy's global generator draws anew for each batch. Departs from the paper by

    - *mean slice*: it takes the mean of L squares, this the square of a mean, which is L times
      smaller on average, and from one random direction a batch;
    - *batch mean* (f is the mean over all data in the paper), *guards again* and *left behind* (see
      `clext.course`).

    `clext.SCP` does not. Labels are not looked at.

    Args:
        model: see `ewc`, as `dataloader`, `device` and `prev_guards`.
        dataloader: see `ewc`.
        L: number of directions, >= 1.
        device: see `ewc`.
        prev_guards: see `ewc`.

    Attributes:
        _state_parameters: the anchor (`p_old` in the other classes); others as in `ewc`.

    Raises:
        ValueError: an argument is not as described; the model is as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches | None,
        L: int,
        device: Device,
        prev_guards: Guards = (None,),
    ) -> None:
        super().__init__(model, dataloader, device, prev_guards)
        try:
            self.L = integer(self._owner, "L", L, minimum=1)
        except ValueError as error:
            raise ValueError(f"{error}; {self._order}") from None
        self._precision_matrices = self._sum_of_guards()
        self._add_importance(self._precision_matrices, ops.accumulate_square_)
        self._state_parameters = self._copies()

    def _objective(self, output: Tensor, label: Tensor) -> Tensor:  # noqa: ARG002
        # The notebook's generator and order of draws: a seeded run has to meet the same directions.
        drawn = np.random.randn(output.shape[-1], self.L)  # noqa: NPY002
        directions = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0)).to(output)
        return directions.mean(dim=1) @ output.mean(dim=0)

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self._state_parameters, self._precision_matrices
