"""The pictures: average accuracy against the epoch, line by line, and the accuracy matrix.

The figures are made without pyplot, so that no display is needed and no global state of matplotlib
is touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from clext.core.checks import as_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from clext.training.metrics import Matrix

_SIZE = (7.2, 4.3)
_AXES_HEIGHT = 3.4  # inches of the height that the frame takes, roughly
_LABEL_POINTS = 9.0
_TEXT = "#222222"
# A scenario of one's own may have a name longer than the picture is wide.
_TITLE_STYLE: dict[str, Any] = {"loc": "left", "fontsize": 12, "fontweight": "bold", "wrap": True}
_MOST_TASK_NAMES = 12
# Of the matrix. Light to dark in even steps, also for the colour-blind and in grey.
_COLOURS = "cividis"
_MOST_NUMBERS = 10
_MOST_TICKS = 10


class _Style(NamedTuple):
    """Colour, dashes and marker: any one of the three is enough to tell the lines apart."""

    color: str
    dashes: str | tuple[float, tuple[float, ...]]
    marker: str


# The course's six and lwf have the colours of Okabe & Ito (2008), which the colour-blind can tell
# apart; yellow is left out because it vanishes on white paper. The others have dark ones of Tol's.
# A method keeps its style from picture to picture.
_STYLES = {
    "baseline": _Style("#000000", (0, (1, 1.5)), "x"),
    "ewc": _Style("#0072B2", "-", "o"),
    "mas": _Style("#E69F00", (0, (5, 1.5)), "s"),
    "si": _Style("#009E73", (0, (6, 1.5, 1, 1.5)), "^"),
    "rwalk": _Style("#D55E00", "-", "D"),
    "scp": _Style("#CC79A7", (0, (3, 1)), "v"),
    "lwf": _Style("#56B4E9", "-", "P"),
    "gem": _Style("#332288", "-", "p"),
    "agem": _Style("#999933", (0, (3, 1)), "h"),
    "replay": _Style("#882255", (0, (5, 1.5)), "X"),
    "icarl": _Style("#8C510A", "-", "*"),
    "dgr": _Style("#117733", "-", "<"),
    "joint": _Style("#777777", "-", "d"),
}
_OTHER_STYLES = (
    _Style("#AA4499", (0, (5, 1.5)), ">"),
    _Style("#44AA99", (0, (6, 1.5, 1, 1.5)), "8"),
    _Style("#CC6677", (0, (1, 1.5)), "H"),
    _Style("#444444", "-", "s"),
)


_Line = tuple[str, Sequence[float], _Style]


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    tasks: int,
    epochs: int,
    title: str,
    path: str | os.PathLike[str] | None = None,
    *,
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Draw a line for each curve, an entry per epoch, labelled with its key; save it at `path`.

    A label is a method's name, which more may follow after a space. `bands` are the lower and the
    upper edge of what is shaded about a curve.
    """
    figure = Figure(figsize=_SIZE, dpi=200, layout="constrained")
    axes = figure.add_subplot()
    styles = _styles(curves)
    lines = [(label, curve, styles[label]) for label, curve in curves.items() if curve]
    for rank, (_, curve, style) in enumerate(lines):
        # One marker a task, each line at another epoch of it, or they would cover each other.
        offset = int((rank + 0.5) / len(lines) * epochs)
        _draw_line(axes, curve, style, markers=(offset, epochs))
    for label, (low, high) in (bands or {}).items():
        epoch = range(1, len(low) + 1)
        inside = np.clip([low, high], 0, 1)  # as accuracies are
        axes.fill_between(epoch, *inside, color=styles[label].color, alpha=0.2, linewidth=0)
    _draw_frame(axes, tasks, epochs)
    axes.set_title(title, pad=20, **_TITLE_STYLE)
    _label_ends(axes, lines, tasks, epochs)
    return _saved(figure, path)


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
    axes.set_title(title, **_TITLE_STYLE)
    axes.set_xlabel("Accuracy on task")
    axes.set_ylabel("After learning task")
    _label_tasks(axes, tasks)
    axes.spines[:].set_visible(False)
    if tasks <= _MOST_NUMBERS:
        _write_numbers(axes, accuracy)
    bar = figure.colorbar(image, ax=axes, aspect=24)
    bar.outline.set_visible(False)
    bar.set_label("Accuracy")
    return _saved(figure, path)


def _saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, which is saved at `path` if that is given; its folder is made if need be."""
    if path is not None:
        file = as_path(path, "plot: path")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return figure


def _styles(labels: Iterable[str]) -> dict[str, _Style]:
    """The style of each label, no two alike while there are enough.

    A method's comes first, then a combination takes that of its second method if it is free.
    """
    styles: dict[str, _Style] = {}
    others = cycle(_OTHER_STYLES)
    names = {label: label.partition(" ")[0] for label in labels}
    for label, name in sorted(names.items(), key=lambda entry: "+" in entry[1]):
        own = _STYLES.get(name.rpartition("+")[2])
        styles[label] = own if own and own not in styles.values() else next(others)
    return styles


def _draw_line(axes: Axes, curve: Sequence[float], style: _Style, markers: tuple[int, int]) -> None:
    axes.plot(
        range(1, len(curve) + 1),
        curve,
        color=style.color,
        linestyle=style.dashes,
        linewidth=1.6,
        marker=style.marker,
        markersize=6,
        markeredgecolor=style.color if style.marker == "x" else "white",
        markeredgewidth=1.4 if style.marker == "x" else 0.6,
        markevery=markers,
        clip_on=False,  # the last point lies on the frame
    )


def _draw_frame(axes: Axes, tasks: int, epochs: int) -> None:
    axes.set_xlabel(f"Epoch ({epochs} per task)" if epochs > 1 else "Epoch (one per task)")
    axes.set_ylabel("Average accuracy over the tasks seen")
    axes.set_xlim(0, tasks * epochs)
    every = -(-tasks // _MOST_TASK_NAMES)
    borders = range(every * epochs, tasks * epochs + 1, every * epochs)
    counted = MaxNLocator(integer=True).tick_values(1, epochs)  # within the only task
    axes.set_xticks([e for e in counted if 1 <= e <= epochs] if tasks == 1 else list(borders))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for k in range(tasks):
        if k > 0:
            axes.axvline(k * epochs, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)))
        if k % every == 0:
            axes.annotate(
                f"task {k + 1}" if k == 0 or tasks <= 8 else f"{k + 1}",
                ((k + 0.5) * epochs, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=_LABEL_POINTS,
                color=_TEXT,
            )


def _label_ends(axes: Axes, lines: Sequence[_Line], tasks: int, epochs: int) -> None:
    """Name each line at the right margin, the names moved apart where they would overlap.

    From one that ends before, fine dots lead there, and its name says how far it came.
    """
    last = tasks * epochs
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    points = _AXES_HEIGHT * 72 / (high - low)
    heights = [curve[-1] * points for _, curve, _ in lines]
    for (label, curve, style), height, place in zip(
        lines,
        heights,
        spread(heights, _LABEL_POINTS * 1.35, (low * points, high * points)),
        strict=True,
    ):
        text = f"{label} {curve[-1]:.3f}"
        if len(curve) < last:
            text += f" ({len(curve) // epochs} of {tasks})"
            axes.hlines(
                curve[-1], len(curve), last, style.color, linestyle=(0, (1, 4)), linewidth=0.9
            )
        axes.annotate(
            text,
            (last, curve[-1]),
            xytext=(18, place - height),
            textcoords="offset points",
            va="center",
            fontsize=_LABEL_POINTS,
            color=_TEXT,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": style.color,
                "linewidth": 1.2,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread(
    places: Sequence[float], gap: float, within: tuple[float, float] = (-math.inf, math.inf)
) -> list[float]:
    """The places moved as little as possible so that neighbours are at least `gap` apart.

    Least squares for a fixed order (pool adjacent violators): groups that collide are set around
    their mean. All lie `within` the lowest and the highest place given, if there is room for them.
    """
    order = np.argsort(places, kind="stable")
    gaps = gap * np.arange(len(places))
    # Less its gap each, places need only be in order.
    groups: list[list[float]] = []
    for wanted in (np.asarray(places)[order] - gaps).tolist():
        groups.append([wanted])
        while len(groups) > 1 and fmean(groups[-2]) > fmean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = np.array([fmean(group) for group in groups for _ in group])
    low, high = within[0], within[1] - gap * (len(places) - 1)
    if low <= high:
        moved = moved.clip(low, high)
    spread_out = np.empty(len(places))
    spread_out[order] = moved + gaps
    return list(spread_out.tolist())


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
