"""Continual-learning metrics from the accuracy matrix.

Throughout, `accuracy` is a [T, T] array whose entry [k, j] is the accuracy on task j after learning
task k (both counted from 0), NaN for tasks j > k that were not seen yet and for rows k that were
not reached. All results are in the units of `accuracy` (here fractions, not per cent).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]


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
