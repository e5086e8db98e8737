"""docs/students.md as a notebook, docs/students.ipynb, executed: `python scripts/notebook.py`.

With `--check` nothing is written: the page has to run, and the notebook to have its cells.
Needs the extra `docs`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

PAGE = Path(__file__).resolve().parents[1] / "docs" / "students.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def main() -> None:
    made = jupytext.read(PAGE, fmt={"extension": ".md", "split_at_heading": True})
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # else drawn at random
    if "--check" in sys.argv and cells(made) != cells(nbformat.read(NOTEBOOK, as_version=4)):
        sys.exit(f"{NOTEBOOK.name} is not {PAGE.name}: run python scripts/notebook.py")
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            made,
            kernel_name="python3",
            record_timing=False,
            coalesce_streams=True,
            resources={"metadata": {"path": folder}},
        )
        client.execute()
    for output in (output for cell in made.cells for output in cell.get("outputs", [])):
        output.get("data", {}).pop("text/html", None)  # repeats the picture
    if "--check" not in sys.argv:
        nbformat.write(made, NOTEBOOK)


if __name__ == "__main__":
    main()
