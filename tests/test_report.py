"""The tables in the documents say what bench/results says: bench/report.py."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import clext

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"

# A source archive has the benchmarks, but neither their results nor a history.
if not BENCH.is_dir():
    pytest.skip("bench/ is absent", allow_module_level=True)
from_an_archive = not (ROOT / ".git").exists() and not (BENCH / "results").is_dir()
has_results = pytest.mark.skipif(from_an_archive, reason="no results in a source archive")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))  # for the benchmarks that it imports
    spec = importlib.util.spec_from_file_location("report", BENCH / "report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables(report: ModuleType) -> ModuleType:
    return sys.modules["result_tables"]  # as the report imported it


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
    assert not stale, f"tables differ from bench/results in {stale}; run python bench/report.py"


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
