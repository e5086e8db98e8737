"""Continual-learning metrics from the accuracy matrix.

Throughout, `accuracy` is a [T, T] array whose entry [k, j] is the accuracy on task j after learning
task k (both counted from 0), NaN for tasks j > k that were not seen yet and for rows k that were
not reached. All results are in the units of `accuracy` (here fractions, not per cent).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Step(TypedDict):
    """Accuracies taken within a task: which task and how many of its steps, on tasks 0..task."""

    task: int
    step: int
    accuracy: list[float]


class Summary(NamedTuple):
    """Of a metric over several seeds; NaN where there are too few values."""

    mean: float
    std: float
    low: float
    high: float


def summary(values: Iterable[float]) -> Summary:
    """Mean, standard deviation and 95 % confidence interval of the mean, of what is finite.

    std = sqrt( 1/(n-1) sum_i (x_i - mean)^2 ); the interval is mean -+ t std / sqrt(n), t the 0.975
    quantile of Student's distribution with n-1 degrees of freedom. Of one value only the mean is
    known.
    """
    known = np.array([value for value in values if math.isfinite(value)])
    if len(known) < 2:
        return Summary(float(known[0]) if len(known) else math.nan, math.nan, math.nan, math.nan)
    from scipy.special import stdtrit

    mean, std = float(known.mean()), float(known.std(ddof=1))
    half = float(stdtrit(len(known) - 1, 0.975)) * std / math.sqrt(len(known))
    return Summary(mean, std, mean - half, mean + half)


def measured(accuracy: ArrayLike) -> Matrix:
    """An accuracy matrix from elsewhere as one of ours, which has NaN above the diagonal.

    ValueError if it is not square, lacks an accuracy in a row that was reached, or holds numbers
    that are no fractions.
    """
    owner = "Result.from_accuracy: accuracy"
    try:
        matrix = np.array(accuracy, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{owner} must be a matrix of numbers [T, T] ({error})") from error
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(f"{owner} must be a matrix [T, T], got shape {list(matrix.shape)}")
    seen = np.tril(np.ones_like(matrix, dtype=bool))
    matrix[~seen] = math.nan
    reached = seen & (np.arange(len(matrix)) < tasks_learned(matrix))[:, None]
    if (np.isfinite(matrix) != reached).any():
        raise ValueError(
            f"{owner} must have a number for each task j <= k after task k, and NaN in whole rows "
            "for tasks that were not learned yet"
        )
    for value in matrix[reached]:
        if not 0 <= value <= 1:
            raise ValueError(
                f"{owner} must be fractions between 0 and 1, got {value:g}; divide per cents by 100"
            )
    return matrix


def array_of(name: str, values: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:  # noqa: ANN401
    """`values` as an array, NaN where they are missing; ValueError if it is of another shape."""
    array = np.array(values, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name} has shape {list(array.shape)}, not {list(shape)}")
    return array


def tasks_learned(accuracy: Matrix) -> int:
    """How many rows of the matrix are filled."""
    return int(np.isfinite(np.diagonal(accuracy)).sum())


def average_accuracy(accuracy: Matrix) -> list[float]:
    """Entry k: the mean accuracy over tasks 0..k after learning task k.

    A_k of Chaudhry et al. 2018 (arXiv:1801.10112, section 3); its last entry is the ACC of
    Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, equation 2).
    """
    return [float(accuracy[k, : k + 1].mean()) for k in range(tasks_learned(accuracy))]


def forgetting(accuracy: Matrix) -> float:
    """Mean over the earlier tasks of (best accuracy ever had - accuracy after the last task).

    F_k of Chaudhry et al. 2018 (arXiv:1801.10112, section 3):
    F_k = 1/(k-1) sum_{j<k} ( max_{l<k} a_{l,j} - a_{k,j} ). Negative if the tasks got better.
    NaN before a second task is learned.
    """
    last = tasks_learned(accuracy) - 1
    if last < 1:
        return math.nan
    best = np.nanmax(accuracy[:last, :last], axis=0)
    return float((best - accuracy[last, :last]).mean())


def backward_transfer(accuracy: Matrix) -> float:
    """Mean over the earlier tasks of (accuracy after the last task - accuracy just after learning).

    BWT of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, equation 3):
    BWT = 1/(T-1) sum_{j<T} ( R_{T,j} - R_{j,j} ). Negative when learning the later tasks hurt the
    earlier ones. NaN before a second task is learned.
    """
    last = tasks_learned(accuracy) - 1
    if last < 1:
        return math.nan
    return float((accuracy[last, :last] - np.diagonal(accuracy)[:last]).mean())


def forward_transfer(before: Vector, untrained: Vector) -> float:
    """Mean over tasks 2..T of (accuracy just before learning it - accuracy of the untrained model).

    FWT of Lopez-Paz & Ranzato 2017 (arXiv:1706.08840, equation 4):
    FWT = 1/(T-1) sum_{j>1} ( R_{j-1,j} - b_j ). Positive when earlier tasks helped. `before` and
    `untrained` are [T]; tasks that were not begun are NaN in `before` and left out. NaN before a
    second task is begun.
    """
    gains = (before - untrained)[1:]
    gains = gains[np.isfinite(gains)]
    return float(gains.mean()) if len(gains) else math.nan


def learning_accuracy(accuracy: Matrix) -> float:
    """Mean over the tasks of the accuracy just after learning it.

    LA of Riemer et al. 2019 (arXiv:1810.11910): 1/T sum_j R_{j,j}. NaN before a task is
    learned.
    """
    count = tasks_learned(accuracy)
    return float(np.diagonal(accuracy)[:count].mean()) if count else math.nan


def intransigence(accuracy: Matrix, joint: Matrix) -> Vector:
    """Entry k: what learning all tasks 0..k together would have given on task k, more than it did.

    I_k of Chaudhry et al. 2018 (arXiv:1801.10112, section 3): I_k = a*_k - a_{k,k}, a*_k the
    accuracy on task k of a model trained on the data of tasks 0..k at once: the diagonal of
    `joint`, the matrix of such a run. Negative where learning one after the other did better. [T],
    NaN for tasks that either has not learned.
    """
    return np.diagonal(joint) - np.diagonal(accuracy)


def worst_accuracy(accuracy: Matrix, steps: Sequence[Step] = ()) -> float:
    """Minimum accuracy: mean over the earlier tasks of the lowest accuracy since it was learned.

    min-ACC of De Lange et al. 2023 (arXiv:2205.13452): 1/(T-1) sum_{j<T} min_n A_j(n),
    n over all evaluations in the tasks after j. Neither the last task counts nor what was found
    just after learning, so that it can be above the average accuracy. Evaluations at the ends of
    tasks are in `accuracy`; the drop at the beginning of a task, the stability gap, is seen by
    `steps` alone, which are taken within tasks. NaN before a task has been tested again.
    """
    lowest: dict[int, float] = {}
    learned = tasks_learned(accuracy)
    ends = [(k, accuracy[k, :k].tolist()) for k in range(learned)]
    within = [(step["task"], step["accuracy"]) for step in steps]
    for task, accuracies in ends + within:
        for j, value in enumerate(accuracies[:task]):
            lowest[j] = min(value, lowest.get(j, value))
    return math.fsum(lowest.values()) / len(lowest) if lowest else math.nan
