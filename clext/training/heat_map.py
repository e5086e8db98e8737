"""The picture of the accuracy matrix: a heat map."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clext.training.plots import TITLE_STYLE, as_it_stands, saved

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from clext.training.metrics import Matrix

# Light to dark in even steps, also for the colour-blind and in grey.
_COLOURS = "cividis"
_MOST_NUMBERS = 10
_MOST_TICKS = 10


def plot_matrix(accuracy: Matrix, title: str, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw what is known of each task after each task, counted from 1; save it at `path`.

    Entries without an accuracy (tasks not seen yet) stay blank.
    """
    tasks = len(accuracy)
    side = 2.6 + 0.42 * min(max(tasks, 3), _MOST_NUMBERS)
    figure = Figure(figsize=(side + 0.4, side), dpi=200, layout="compressed")
    axes = figure.add_subplot()
    shown = np.ma.masked_invalid(accuracy)
    image = axes.imshow(shown, cmap=_COLOURS, vmin=0, vmax=1, aspect="equal")
    axes.set_title(as_it_stands(title), **TITLE_STYLE)
    axes.set_xlabel("Accuracy on task")
    axes.set_ylabel("After learning task")
    _label_tasks(axes, tasks)
    axes.spines[:].set_visible(False)
    if tasks <= _MOST_NUMBERS:
        _write_numbers(axes, accuracy)
    bar = figure.colorbar(image, ax=axes, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label("Accuracy")
    return saved(figure, path)


def _label_tasks(axes: Axes, tasks: int) -> None:
    if tasks <= _MOST_TICKS:
        places = list(range(tasks))
    else:
        counted = MaxNLocator(_MOST_TICKS, integer=True).tick_values(1, tasks)
        places = [int(task) - 1 for task in counted if 1 <= task <= tasks]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(places, [str(place + 1) for place in places])
        axis.set_tick_params(length=0)


def _write_numbers(axes: Axes, accuracy: Matrix) -> None:
    colours = colormaps[_COLOURS]
    for (k, j), value in np.ndenumerate(accuracy):
        if np.isfinite(value):
            red, green, blue, _ = colours(float(value))
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
            axes.text(
                j,
                k,
                f"{value:.2f}",
                ha="center",
                va="center",
                fontsize=8,
                color="black" if light else "white",
            )
