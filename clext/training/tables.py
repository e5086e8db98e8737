"""Tables of words, as people read and paste them: aligned text, Markdown, LaTeX."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

Row = Mapping[str, str]

_ESCAPES = str.maketrans({"±": r"$\pm$", "%": r"\%", "_": r"\_", "&": r"\&", "#": r"\#"})


def number(value: float, form: str) -> str:
    """`value` in that form, or "-" where there is none."""
    return "-" if math.isnan(value) else format(value, form)


def text(rows: Sequence[Row], left: Collection[str]) -> list[str]:
    """The titles and a line for each row, all of one width; columns `left` are aligned there."""
    columns = []
    for title in rows[0] if rows else ():
        cells = [title, *(row[title] for row in rows)]
        width, align = max(map(len, cells)), "<" if title in left else ">"
        columns.append([f"{cell:{align}{width}}" for cell in cells])
    return ["  ".join(cells) for cells in zip(*columns, strict=True)]


def markdown(rows: Sequence[Row], left: Collection[str]) -> list[str]:
    """The same as a table of Markdown."""
    titles = [*rows[0]]
    rules = ["---" if title in left else "---:" for title in titles]
    lines = [titles, rules, *([row[title] for title in titles] for row in rows)]
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
