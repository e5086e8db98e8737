"""The pictures of accuracy against the epoch: of several runs their averages, of one its tasks.

The figures are made without pyplot, so that no display is needed and no global state of matplotlib
is touched.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, cycle
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from clext.core.checks import as_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (7.2, 4.3)
_AXES_HEIGHT = 3.4  # inches of the height that the frame takes, roughly
_LABEL_POINTS = 9.0
_TEXT = "#222222"
# A scenario of one's own may have a name longer than the picture is wide.
TITLE_STYLE: dict[str, Any] = {
    "loc": "left",
    "fontsize": 12,
    "fontweight": "bold",
    "wrap": True,
}
_MOST_TASK_NAMES = 12
# Two strokes across an axis that does not begin at zero.
_CUT = Path([(-1, -1), (1, 0), (-1, 0), (1, 1)], [Path.MOVETO, Path.LINETO] * 2)
_TASK_COLOURS = "viridis"  # dark to light, but for what would vanish on white paper
_LIGHTEST = 0.85


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


class _Line(NamedTuple):
    """A curve and its name; entry i was taken after epoch `first` + i * `every`."""

    label: str
    accuracies: Sequence[float]
    style: _Style
    first: int = 1
    every: int = 1

    @property
    def epochs(self) -> range:
        return range(self.first, self.first + self.every * len(self.accuracies), self.every)


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    tasks: int,
    epochs: int,
    title: str,
    path: str | os.PathLike[str] | None = None,
    *,
    chance: Sequence[float] = (),
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
) -> Figure:
    """Draw a line for each curve, an entry per epoch, labelled with its key; save it at `path`.

    A label is a method's name, which more may follow after a space. `chance` has an entry per task.
    `bands` are the lower and the upper edge of what is shaded about a curve.
    """
    styles = _styles(curves)
    lines = [_Line(label, curve, styles[label]) for label, curve in curves.items() if curve]
    figure, axes = _begin(title, "Average accuracy over the tasks seen")
    for rank, line in enumerate(lines):
        # One marker a task, each line at another epoch of it, or they would cover each other.
        _draw_line(axes, line, (int((rank + 0.5) / len(lines) * epochs), epochs))
    for label, (low, high) in (bands or {}).items():
        epoch = range(1, len(low) + 1)
        inside = np.clip([low, high], 0, 1)  # as accuracies are
        axes.fill_between(epoch, *inside, color=styles[label].color, alpha=0.2, linewidth=0)
    _draw_frame(axes, tasks, epochs)
    _draw_levels(axes, lines, chance, epochs)
    _label_ends(axes, lines, tasks, epochs)
    return saved(figure, path)


def plot_tasks(
    rows: Mapping[int, Sequence[float]],
    tasks: int,
    epochs: int,
    title: str,
    path: str | os.PathLike[str] | None = None,
    *,
    chance: Sequence[float] = (),
) -> Figure:
    """Draw a line for each task, labelled with its number from 1; save it at `path`.

    `rows` has the accuracies on tasks 0, 1, ... by the epoch, counted from 1, after which they were
    taken. `chance` has an entry per task.
    """
    figure, axes = _begin(title, "Accuracy on each task")
    shades = colormaps[_TASK_COLOURS](np.linspace(0, _LIGHTEST, tasks))
    every, markers = min(rows, default=1), cycle(style.marker for style in _STYLES.values())
    lines = []
    for j, (shade, marker) in enumerate(zip(shades.tolist(), markers, strict=False)):
        taken = {epoch: row[j] for epoch, row in rows.items() if j < len(row)}
        style, first = _Style(to_hex(shade), "-", marker), min(taken, default=1)
        lines.append(_Line(f"task {j + 1}", [*taken.values()], style, first, every))
    lines = [line for line in lines if line.accuracies]
    for line in lines:
        _draw_line(axes, line, ((epochs - 1) // every, max(1, epochs // every)))
    _draw_frame(axes, tasks, epochs)
    _draw_levels(axes, lines, chance, epochs)
    _label_ends(axes, lines[:: -(-tasks // _MOST_TASK_NAMES)], tasks, epochs)
    return saved(figure, path)


def _begin(title: str, what: str) -> tuple[Figure, Axes]:
    """A figure, and its axes."""
    figure = Figure(figsize=_SIZE, dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set_ylabel(what)
    axes.set_title(as_it_stands(title), pad=20, **TITLE_STYLE)
    return figure, axes


def as_it_stands(name: str) -> str:
    """A name that is not read as mathematics, whatever its dollars enclose."""
    return name.replace("$", r"\$")


def saved(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """The figure, which is saved at `path` if that is given; its folder is made if need be."""
    if path is not None:
        file = as_path(path, "plot: path")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    return figure


def _styles(labels: Iterable[str]) -> dict[str, _Style]:
    """The style of each label, no two alike while there are enough.

    A method's comes first, then a combination takes that of its second method if it is free; what
    is left takes other ones, and then those of methods that are not there.
    """
    styles: dict[str, _Style] = {}
    names = {label: label.partition(" ")[0] for label in labels}
    for label, name in sorted(names.items(), key=lambda entry: "+" in entry[1]):
        own = _STYLES.get(name.rpartition("+")[2])
        if own and own not in styles.values():
            styles[label] = own
    known = [*_OTHER_STYLES, *_STYLES.values()]
    free = [style for style in known if style not in styles.values()]
    rest = [label for label in names if label not in styles]
    return styles | dict(zip(rest, chain(free, cycle(known)), strict=False))


def _draw_line(axes: Axes, line: _Line, markers: tuple[int, int]) -> None:
    style = line.style
    axes.plot(
        line.epochs,
        line.accuracies,
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


def _draw_levels(axes: Axes, lines: Sequence[_Line], chance: Sequence[float], epochs: int) -> None:
    """Let the axis begin at zero, or show chance, if at most half of it stays empty; mark a cut."""
    drawn = np.array([value for line in lines for value in line.accuracies], dtype=float)
    low = float(np.nanmin(drawn)) if np.isfinite(drawn).any() else 0.0
    floors = [floor for floor in (0.0, *sorted(chance)[:1]) if low - floor <= (1 - floor) / 2]
    values = {f"{height:.2f}" for height in chance}
    level = f"chance {values.pop()}" if len(values) == 1 else "chance"
    if floors:
        for k, height in enumerate(chance):
            ends = k * epochs, (k + 1) * epochs
            axes.hlines(height, *ends, _TEXT, linestyle=(0, (1, 1.5)), linewidth=1)
        if chance:
            _write(axes, level, (0, chance[0]), xytext=(4, 4))
    if 0.0 in floors:
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1])
        return
    axes.plot(
        0, 0.03, marker=_CUT, markersize=9, color=_TEXT, clip_on=False, transform=axes.transAxes
    )
    hidden = f"; {level} is below" if chance and not floors else ""
    axes.set_ylabel(f"{axes.get_ylabel()}\n(axis does not begin at 0{hidden})")


def _draw_frame(axes: Axes, tasks: int, epochs: int) -> None:
    axes.set_xlabel(f"Epoch ({epochs} per task)" if epochs > 1 else "After task")
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
            name = f"task {k + 1}" if k == 0 or tasks <= 8 else f"{k + 1}"
            place = (k + 0.5) * epochs, 1
            _write(axes, name, place, ha="center", xycoords=("data", "axes fraction"))


def _write(axes: Axes, text: str, place: tuple[float, float], **options: Any) -> None:  # noqa: ANN401
    """Small words a little above a place."""
    shift: dict[str, Any] = {"xytext": (0, 4), "textcoords": "offset points"}
    axes.annotate(text, place, fontsize=_LABEL_POINTS, color=_TEXT, **{**shift, **options})


def _label_ends(axes: Axes, lines: Sequence[_Line], tasks: int, epochs: int) -> None:
    """Name each line at the right margin, the names moved apart where they would overlap.

    From one that ends before, fine dots lead there, and its name says how far it came.
    """
    last = tasks * epochs
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    points = _AXES_HEIGHT * 72 / (high - low)
    heights = [line.accuracies[-1] * points for line in lines]
    places = spread(heights, _LABEL_POINTS * 1.35, (low * points, high * points))
    for line, height, place in zip(lines, heights, places, strict=True):
        value, end, color = line.accuracies[-1], line.epochs[-1], line.style.color
        text = f"{as_it_stands(line.label)} {value:.3f}"
        if end < last:
            text += f" ({end // epochs} of {tasks})"
            axes.hlines(value, end, last, color, linestyle=(0, (1, 4)), linewidth=0.9)
        axes.annotate(
            text,
            (last, value),
            xytext=(18, place - height),
            textcoords="offset points",
            va="center",
            fontsize=_LABEL_POINTS,
            color=_TEXT,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
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
