"""The report: one page of all results that a folder holds."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from clext.core.checks import as_path
from clext.training.comparison import Comparison
from clext.training.outcome import Outcome, Section, write_page
from clext.training.result import Result
from clext.training.storage import COMPARISON_NAME, REPORT_NAME, RESULT_NAME, SWEEP_NAME
from clext.training.sweep_result import Sweep

# In this order on the page.
_LOADERS: dict[str, Callable[[Path], Outcome]] = {
    SWEEP_NAME: Sweep.load,
    COMPARISON_NAME: Comparison.load,
    RESULT_NAME: Result.load,
}


def write_report(
    folder: str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Write a page of every sweep, comparison and result in `folder` and the folders below it.

    The runs of a sweep are not shown one by one. What cannot be read has a section that says why.

    Args:
        folder: with the files that `clext.train`, `compare` and `sweep` have saved.
        path: of the page; by default `report.html` in `folder`.

    Raises:
        FileNotFoundError: there is nothing of that kind.
    """
    root = as_path(folder, "report: folder")
    files = [file for name in _LOADERS for file in sorted(root.rglob(name))]
    if not root.is_dir():
        raise FileNotFoundError(f"report: {root} is not a folder; give one that holds results")
    if not files:
        raise FileNotFoundError(
            f"report: expected a folder with {', '.join(_LOADERS)}, found none in {root}"
        )
    sections: list[Section] = []
    in_sweeps: set[Path] = set()
    for file in files:
        if file in in_sweeps:
            continue
        place = f"{file.parent.relative_to(root)}: "
        try:
            found = _LOADERS[file.name](file)
        except (OSError, ValueError) as error:
            warnings.warn(f"report: {error}", stacklevel=2)
            sections.append(Section(f"{place}not readable", notes=[str(error)]))
            continue
        if isinstance(found, Sweep):
            in_sweeps |= {file.parent / str(run) / RESULT_NAME for run in found.runs}
        section = found.section()
        section.title = place.removeprefix(".: ") + section.title
        sections.append(section)
    return write_page(root / REPORT_NAME if path is None else path, f"Results in {root}", sections)
