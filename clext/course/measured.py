"""Importance measured on data, on top of earlier objects': the course's `ewc`, `mas` and `scp`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext import ops
from clext.core.checks import integer
from clext.core.modes import module_mode
from clext.core.supervision import Supervision
from clext.course.base import CourseMethod, Device, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    from clext.core.batches import Batches
    from clext.core.lists import TensorList

    Accumulate = Callable[[TensorList, TensorList, float], None]

Guards = Sequence[Mapping[str, Tensor] | None]


def sum_of_guards(method: CourseMethod, guards: Guards) -> Tensors:
    """What earlier objects have measured; ValueError where it is that of something else."""
    total = method._zeros()
    for index, guard in enumerate(guards):
        if not guard:
            continue
        found = guard if isinstance(guard, Mapping) else {}
        for key, entry in total.items():
            if getattr(found.get(key), "shape", None) != entry.shape:
                raise ValueError(
                    f"{method._owner}: prev_guards[{index}] has no tensor '{key}' of shape "
                    f"{list(entry.shape)}, expected the _precision_matrices of an earlier "
                    f"{method._owner} on this model, in a list"
                )
            entry.add_(found[key].to(entry))
    return total


def add_mean_importance_(
    method: CourseMethod,
    total: Tensors,
    values: Iterable[Tensor],
    accumulate: Accumulate,
    weight: float = 1.0,
) -> None:
    """Add `weight` times the mean over `values`, one for each batch, of a gradient's size.

    The model is left as the notebook leaves it, after an error as it was.
    """
    sums, batches = method._zeros(), 0
    before = [p.grad for p in method.params.values()]
    try:
        with module_mode(method.model, training=False), torch.enable_grad():
            for value in values if method.dataloader is not None else ():
                method.model.zero_grad()
                value.backward()
                found = {k: p.grad for k, p in method._keyed().items() if p.grad is not None}
                accumulate([sums[k] for k in found], list(found.values()), 1.0)
                batches += 1
    except BaseException:
        for p, grad in zip(method.params.values(), before, strict=True):
            p.grad = grad
        raise
    method.model.eval()
    if batches > 0:
        for key, entry in total.items():
            entry.add_(sums[key], alpha=weight / batches)


def cross_entropies(method: CourseMethod) -> Iterator[Tensor]:
    """The loss of each batch (x, y), of which more entries (a task's number) are not looked at."""
    supervision = Supervision(method.model)
    for x, y in supervision.read(method._owner, method.dataloader, torch.device(method.device)):
        assert y is not None  # as it is read
        yield F.cross_entropy(method.model(x), y)


class Measured(CourseMethod):
    """The importance of the task, as it is, on top of the guards."""

    _accumulate: staticmethod[..., None] = staticmethod(ops.accumulate_square_)

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches | None,
        device: Device,
        prev_guards: Guards = (None,),
    ) -> None:
        super().__init__(model, dataloader, device)
        self.previous_guards_list = prev_guards
        self._precision_matrices = self.calculate_importance()
        self.p_old = self._copies()

    def calculate_importance(self) -> Tensors:
        """The importance by name: `mas` and `scp` of the notebook have this method, ..."""
        return self._calculate_importance()

    def _calculate_importance(self) -> Tensors:
        """... its `ewc` this one. A subclass may have either."""
        total = sum_of_guards(self, self.previous_guards_list)
        add_mean_importance_(self, total, self._values(), self._accumulate)
        return total

    def _values(self) -> Iterator[Tensor]:
        """What is differentiated: a number for each batch."""
        raise NotImplementedError

    def _outputs(self) -> Iterator[Tensor]:
        """Those of the model for each batch, of which only the inputs are looked at."""
        supervision = Supervision(self.model)
        device = torch.device(self.device)
        for x, _ in supervision.read(self._owner, self.dataloader, device, labelled=False):
            yield self.model(x)

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self.p_old, self._precision_matrices


class ewc(Measured):  # noqa: N801  (the notebook's name)
    """Elastic Weight Consolidation (Kirkpatrick et al. 2017, arXiv:1612.00796), the course's way.

    Importance: squared gradient of the cross-entropy with the labels of the data. Departs from the
    paper by *batch mean*, *guards again* and *left behind* (see `clext.course`); `clext.EWC` does
    not.

    Args:
        model: from a batch of inputs to logits; its trainable parameters are protected.
        dataloader: of the task that has ended, batches of (x, y, ...); None before the first task:
            then the importances are the sum of `prev_guards`.
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

    def _values(self) -> Iterator[Tensor]:
        return cross_entropies(self)


class mas(Measured):  # noqa: N801  (the notebook's name)
    """Memory Aware Synapses (Aljundi et al. 2018, arXiv:1711.09601), the course's way.

    Importance: absolute gradient of the squared norm of the outputs; labels are not looked at, and
    batches may be x or (x,) as well. Departs from the paper by *batch mean*, *guards again* and
    *left behind* (see `clext.course`); `clext.MAS` does not. The course leaves this importance to
    the student: a copy of the notebook in which it is missing has zeros for it and trains like the
    baseline.

    Arguments, attributes and errors are those of `ewc`.
    """

    _accumulate = staticmethod(ops.accumulate_abs_)

    def _values(self) -> Iterator[Tensor]:
        return (output.square().sum(dim=1).mean() for output in self._outputs())


class scp(Measured):  # noqa: N801  (the notebook's name)
    """Sliced Cramer Preservation (Kolouri et al. 2020, ICLR), the course's way.

    Importance: squared gradient of xi . f, f the mean output of a batch and xi the mean of `L`
    directions that numpy's global generator draws anew for each batch. Departs from the paper by

    - *mean slice*: it takes the mean of L squares, this the square of a mean, which is L times
      smaller on average, and from one random direction a batch;
    - *batch mean* (f is the mean over all data in the paper), *guards again* and *left behind* (see
      `clext.course`).

    `clext.SCP` does not. Labels are not looked at, and batches may be x or (x,) as well.

    Arguments, attributes and errors are those of `ewc`, but for `L`, the number of directions,
    >= 1, and `_state_parameters`, the anchor.
    """

    def __init__(
        self,
        model: nn.Module,
        dataloader: Batches | None,
        L: int,
        device: Device,
        prev_guards: Guards = (None,),
    ) -> None:
        self.L = integer(self._owner, "L", L, minimum=1)
        super().__init__(model, dataloader, device, prev_guards)
        self._state_parameters = self.p_old
        del self.p_old  # one name for the anchor, so that no write to another is lost

    def _values(self) -> Iterator[Tensor]:
        for output in self._outputs():
            # The notebook's generator and order of draws: a seeded run meets the same directions.
            drawn = np.random.randn(output.shape[-1], self.L)  # noqa: NPY002
            directions = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0)).to(output)
            yield directions.mean(dim=1) @ output.mean(dim=0)

    def _quadratic(self) -> tuple[Tensors, Tensors]:
        return self._state_parameters, self._precision_matrices
