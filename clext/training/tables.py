"""Tables of results, as people read and paste them: aligned text, Markdown, LaTeX, CSV."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clext.training.result import Result

Row = Mapping[str, str]
WIDTH = 80  # of a terminal
_NAMES = ("method", "strength", "accuracy on")  # columns that say what a row is about

METRICS: dict[str, Callable[[Result], float]] = {
    "accuracy": lambda result: [math.nan, *result.average_accuracy][-1],
    "forgetting": lambda result: result.forgetting,
    "backward_transfer": lambda result: result.backward_transfer,
    "forward_transfer": lambda result: result.forward_transfer,
    "learning_accuracy": lambda result: result.learning_accuracy,
    "worst_accuracy": lambda result: result.worst_accuracy,
}
_ESCAPES = str.maketrans(
    {sign: rf"\{sign}" for sign in "%_&#${}"}
    | {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
)


def number(value: float, form: str) -> str:
    """`value` in that form, or "-" where there is none."""
    return "-" if math.isnan(value) else format(value, form)


def seconds(value: float) -> str:
    """A time, with a digit after the point where that says something."""
    return f"{value:.{value < 100:d}f} s"


def text(rows: Sequence[Row], left: Collection[str]) -> list[str]:
    """The titles and a line for each row, all of one width; columns `left` are aligned there.

    Columns beyond the 80th character stand below, beside those once more that name the rows.
    """
    columns: list[list[str]] = []
    names: list[list[str]] = []
    for title in rows[0] if rows else ():
        cells = [title, *(row[title] for row in rows)]
        width, align = max(map(len, cells)), "<" if title in left else ">"
        (names if title in _NAMES else columns).append([f"{cell:{align}{width}}" for cell in cells])
    blocks = [[*names]]
    for column in columns:
        width = sum(len(cells[0]) + 2 for cells in [*blocks[-1], column]) - 2
        if width > WIDTH and len(blocks[-1]) > len(names):
            blocks.append([*names])
        blocks[-1].append(column)
    tables = [["  ".join(cells) for cells in zip(*block, strict=True)] for block in blocks]
    return [*tables[0], *(line for table in tables[1:] for line in ["", *table])]


def hanging(head: str, words: str) -> str:
    """`head` and lines of words beside it."""
    return textwrap.fill(
        words,
        WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def markdown(rows: Sequence[Row], left: Collection[str]) -> list[str]:
    """The same as a table of Markdown."""
    titles = [*rows[0]]
    rules = ["---" if title in left else "---:" for title in titles]
    cells = [[row[title].replace("|", r"\|") for title in titles] for row in rows]
    lines = [titles, rules, *cells]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def latex(rows: Sequence[Row], left: Collection[str]) -> list[str]:
    """The same as a `tabular` of LaTeX with the rules of its package booktabs."""
    titles = [*rows[0]]
    lines = [
        " & ".join(cell.translate(_ESCAPES) for cell in cells) + r" \\"
        for cells in [titles, *(row.values() for row in rows)]
    ]
    columns = "".join("l" if title in left else "r" for title in titles)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule"]
    return [*top, *lines[1:], r"\bottomrule", r"\end{tabular}"]


def comma_separated(records: Sequence[Mapping[str, object]]) -> str:
    """The titles and a line for each record, in full precision; what is not known stays empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [*records[0]] if records else [], lineterminator="\n")
    writer.writeheader()
    for record in records:
        unknown = {name for name, value in record.items() if value != value}  # NaN
        writer.writerow({name: "" if name in unknown else v for name, v in record.items()})
    return file.getvalue().removesuffix("\n")


FORMATS = {"text": text, "markdown": markdown, "latex": latex}
