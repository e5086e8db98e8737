"""Writes the tables of the documents from bench/results: `python bench/report/report.py`.

With --check nothing is written; the exit code is 1 where a table differs from the results.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/

from report import accuracy_tables, method_table, speed_tables

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "bench" / "README.md", *(ROOT / "docs").glob("*.md")]

TABLES: dict[str, Callable[[], str]] = {
    "methods": method_table.method_table,
    "accuracy": accuracy_tables.accuracy_table,
    "penalty": speed_tables.penalty_table,
    "traffic": speed_tables.traffic_table,
    "ops": speed_tables.ops_table,
    "projection": speed_tables.projection_table,
    "fused": speed_tables.fused_table,
    "optim": speed_tables.optim_table,
    "state_dtype": speed_tables.state_dtype_table,
    "protocol": speed_tables.protocol_table,
    "step": speed_tables.step_table,
    "rehearsal": speed_tables.rehearsal_table,
    "kfac": speed_tables.kfac_table,
    "plan": speed_tables.plan_table,
    "frameworks": speed_tables.frameworks_table,
    "others": speed_tables.others_table,
    "communication": speed_tables.communication_table,
    "importance": speed_tables.importance_table,
    "course": accuracy_tables.course_table,
    "course_sizes": speed_tables.course_sizes_table,
    "course_step": speed_tables.course_step_table,
    "published": accuracy_tables.published_table,
    "kept": accuracy_tables.kept_table,
    "sweep": accuracy_tables.sweep_table,
    "encoder": accuracy_tables.encoder_table,
    "optimizer_importance": accuracy_tables.optimizer_importance_table,
}


def filled(text: str) -> str:
    """`text` with every `<!-- table NAME -->...<!-- end -->` block written anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def stale() -> list[Path]:
    """The documents in which a table differs from the results."""
    texts = {path: path.read_text() for path in DOCUMENTS}
    return [path for path, text in texts.items() if filled(text) != text]


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare only.")
def report(check: bool) -> None:
    paths = stale()
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in paths) or "nothing"
    if check and paths:
        raise SystemExit(f"{names}: tables differ from bench/results; run bench/report/report.py")
    for path in paths:
        path.write_text(filled(path.read_text()))
    print(f"{'stale' if check else 'written'}: {names}")


if __name__ == "__main__":
    report()
