"""Gradient Episodic Memory (Lopez-Paz and Ranzato 2017, arXiv:1706.08840)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from clext.core.checks import number
from clext.methods.projection import GradientProjection

if TYPE_CHECKING:
    from typing import Unpack

    from clext.core.processes import Processes
    from clext.core.supervision import SupervisionOptions

# Of the iterations that the solver is given, for each unknown; its own default is 3.
_ITERATIONS = 100


class GEM(GradientProjection):
    """No step may raise the loss on the memory of a past task, to first order.

    With g the gradient of the step and G the gradients [T, P] of the mean loss on the memory of
    each of T past tasks, the step is taken along the nearest g' for which no product with a row of
    G is negative. It is g where that holds already, else g + G^T v, with v the minimum of

        1/2 v^T (G G^T + ridge I) v + (G g)^T v   subject to   v >= margin,

    the dual of the paper's quadratic program (its equation 11). All of it is known from the
    products of the T + 1 gradients: they alone go to the host, where the program is solved.

    Each step runs the model forward and backward over the memory of every past task. Memory is
    bounded by `per_task` examples a task and, for the gradients, T times the parameters.

    Args:
        model: see `Method`.
        strength: none; there is no penalty.
        per_task: examples kept of each task, >= 1; all of a task that has fewer.
        margin: lower bound of the weights of past gradients in the projection, >= 0 ("memory
            strength" in the authors' code); pulls further in favour of past tasks than is needed.
        ridge: added to the diagonal of G G^T, >= 0; the authors' code has 1e-3.
        seed: of the examples drawn.
    """

    name: ClassVar[str] = "gem"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        per_task: int = 256,
        margin: float = 0.5,
        ridge: float = 0.0,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, per_task=per_task, seed=seed, **supervision)
        self.margin = number(self.name, "margin", margin, minimum=0.0)
        self.ridge = number(self.name, "ridge", ridge, minimum=0.0)

    def _row_count(self) -> int:
        return len(self._sizes)

    def _write_rows(
        self, rows: list[Tensor], params: list[nn.Parameter], processes: Processes
    ) -> None:
        for k, examples in enumerate(self._kept_tasks()):
            self._write_row(rows, k, params, examples, processes)

    def _weights(self, gram: Tensor) -> Tensor | None:
        weights = projection_weights(gram.cpu().numpy(), self.margin, self.ridge)
        return None if weights is None else torch.from_numpy(weights).to(gram.device)


def projection_weights(
    gram: NDArray[np.float64], margin: float, ridge: float = 0.0
) -> NDArray[np.float64] | None:
    """The v of GEM's quadratic program; None where the gradient stays as it is.

    Args:
        gram: float64 [T + 1, T + 1], the products of the T past gradients and, last, the current
            one. Where they are not finite, no gradient can be mended.
        margin: lower bound of v.
        ridge: added to the diagonal of the past gradients' part.
    """
    past, products = gram[:-1, :-1], gram[:-1, -1]
    if not np.isfinite(gram).all() or not (products < 0).any():
        return None
    return solve_dual(past + ridge * np.eye(len(products)), products, margin)


def solve_dual(
    past: NDArray[np.float64], products: NDArray[np.float64], margin: float
) -> NDArray[np.float64]:
    """The v that makes 1/2 v^T past v + products^T v smallest, subject to v >= margin.

    Args:
        past: float64 [T, T], symmetric and positive semidefinite.
        products: float64 [T], none outside of the directions that `past` reaches.
        margin: lower bound of v.
    """
    from scipy.optimize import nnls  # takes as long to import as all of clext

    # With u = v - margin it is 1/2 u^T K u + c^T u over u >= 0; scaled to ones on the diagonal, or
    # tasks whose gradients are small would drown.
    size = np.sqrt(past.diagonal())
    scale = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    correlations = past * np.outer(scale, scale)
    linear = (products + margin * past.sum(axis=1)) * scale
    # K = A^T A and c = -A^T b turn it into |A u - b|^2. Directions without extent are left out: the
    # gradients do not reach them, and neither does c.
    extents, directions = np.linalg.eigh(correlations)
    kept = extents > len(extents) * np.finfo(np.float64).eps * extents.max()
    roots = np.sqrt(extents[kept])
    matrix = roots[:, None] * directions[:, kept].T
    target = -(directions[:, kept].T @ linear) / roots
    largest = np.abs(target).max(initial=0.0) or 1.0
    solution, _ = nnls(matrix, target / largest, maxiter=_ITERATIONS * len(products))
    weights: NDArray[np.float64] = margin + largest * scale * solution
    return weights
