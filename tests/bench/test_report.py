"""The tables in the documents say what bench/results says: bench/report/report.py."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import clext

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"

# A source archive has the benchmarks, but neither their results nor a history.
if not BENCH.is_dir():
    pytest.skip("bench/ is absent", allow_module_level=True)
from_an_archive = not (ROOT / ".git").exists() and not (BENCH / "results").is_dir()
has_results = pytest.mark.skipif(from_an_archive, reason="no results in a source archive")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("report.report")


@pytest.fixture
def tables(report: ModuleType) -> ModuleType:
    return importlib.import_module("report.result_tables")


def entry(device: str, ms: float, **more: object) -> dict[str, object]:
    """A line of results, as far as the tables look at it."""
    machine = {
        "device": device,
        "threads": 2,
        "torch": "2.15.0",
        "clext": "0.1.0",
        "date": "2026-11-22T20:00:00+00:00",
    }
    return {"ms": {"clext": ms}, "machine": machine, **more}


@has_results
def test_the_tables_are_what_the_results_say(report: ModuleType):
    stale = [path.relative_to(ROOT).as_posix() for path in report.stale()]
    assert not stale, f"{stale} differ from bench/results; run python bench/report/report.py"


def test_every_table_has_a_place_in_a_document(report: ModuleType):
    texts = "".join(path.read_text() for path in report.DOCUMENTS)
    assert set(re.findall(r"<!-- table (\w+) -->", texts)) == set(report.TABLES)


def test_the_newest_line_counts_for_each_device(tables: ModuleType):
    lines = [entry("A", 1.0, op="x"), entry("B", 2.0, op="x"), entry("A", 3.0, op="x")]
    assert tables.newest(lines, "op") == [lines[2], lines[1]]


def test_each_device_gets_a_table_that_names_it(tables: ModuleType):
    lines = [entry("A", 1.0), entry("B", 2.0)]
    text = tables.by_device(lines, ["op", "ms"], lambda e: ["x", f"{e['ms']['clext']:.1f}"])
    assert text.splitlines() == [
        "| op | ms |",
        "| --- | ---: |",
        "| x | 1.0 |",
        "",
        "Measured on A, 2 threads, torch 2.15.0, clext 0.1.0 (2026-11-22).",
        "",
        "| op | ms |",
        "| --- | ---: |",
        "| x | 2.0 |",
        "",
        "Measured on B, 2 threads, torch 2.15.0, clext 0.1.0 (2026-11-22).",
    ]
    assert tables.by_device([], ["op"], list) == "Not measured yet."


def test_a_table_is_written_between_its_marks_alone(report: ModuleType, monkeypatch):
    monkeypatch.setitem(report.TABLES, "plan", lambda: "| new |")
    before = "a\n<!-- table plan -->\n| old |\n<!-- end -->\nb\n"
    assert report.filled(before) == "a\n<!-- table plan -->\n| new |\n<!-- end -->\nb\n"


def test_a_method_without_a_strength_has_a_line_in_the_tables(
    report: ModuleType, monkeypatch, tmp_path
):
    folder = tmp_path / "permuted_mnist"
    settings = {"dataset": "digits", "tasks": 1, "epochs": 1, "progress": False}
    run = clext.compare(["baseline"], **settings, out=folder)["baseline"]
    monkeypatch.setattr(report.accuracy_tables, "RESULTS", tmp_path)
    value = f"{run.average_accuracy[-1]:.4f}"
    line = f"| `baseline` |  | {value} | {value} |"
    assert report.TABLES["accuracy"]().splitlines()[2:] == [line]


def test_replay_is_shown_beside_a_batch_as_large(report: ModuleType, monkeypatch):
    ratios = {"baseline": 1.0, "replay": 1.9}
    line = entry("A", 1.0, model="mlp", precision="fp32", against_larger={"replay": 1.04})
    lines = [{**line, "ms": ratios, "against_baseline": ratios, "against_hand": {}}]
    monkeypatch.setattr(report.speed_tables, "read_lines", lambda _name: lines)
    table = report.TABLES["rehearsal"]().split("\n\n")[0]
    assert table.splitlines()[0].endswith("| of a step with as large a batch |")
    assert table.splitlines()[2:] == [
        "| baseline | fp32 | 1.00 | 1.00x |  |  |",
        "| replay | fp32 | 1.90 | 1.90x |  | 1.04x |",
    ]


@pytest.mark.parametrize(
    ("accuracies", "cells"),
    [
        ({}, "not run yet |  |  |  |"),
        ({0: 70.0, 1: 74.0}, "72.00 | 2 | agrees | 2 |"),
        ({0: 66.0, 1: 70.0, 2: 74.0}, "70.00 +- 4.0 | 3 | agrees | 2 |"),
        ({0: 60.0, 1: 64.0, 2: 68.0}, "64.00 +- 4.0 | 3 | differs | 2 |"),
    ],
)
def test_published_rows_of_three_runs_show_how_these_scatter(
    report: ModuleType, monkeypatch, accuracies, cells
):
    options = "LwF(balance='tasks', temperature=2.0, scale='mean')"
    row = {"name": "vandeven2018-split", "row": "LwF, domain", "method": options}
    lines = [entry("A", 1.0, **row, seed=s, accuracy=a, seconds=90) for s, a in accuracies.items()]
    again = [{**line, "machine": {**line["machine"], "device": "B"}} for line in lines]
    # As the row was before its options changed.
    stale = [{**line, "method": "LwF(balance='tasks')", "accuracy": 1.0} for line in lines]
    monkeypatch.setattr(report.accuracy_tables, "read_lines", lambda _name: lines + again + stale)
    table = report.TABLES["published"]().splitlines()
    assert "| clext, % (+- standard deviation of the runs) |" in table[0]
    (line,) = (line for line in table if "| LwF, domain |" in line)
    assert line == f"| `vandeven2018-split` | LwF, domain | 71.02 | 5 | {cells}"


@has_results
def test_the_picture_of_accuracy_by_bytes_is_drawn_from_the_results(
    report: ModuleType, tmp_path: Path
):
    picture = importlib.import_module("report.kept_picture")
    picture.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    rows = [row.name for row, _, size in report.accuracy_tables.kept_bytes() if size > 0]
    assert {"DER, 200", "DER, 500", "DER, 5120"} <= set(rows)
