"""What the tables of results are made with: lines of bench/results in, Markdown out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
NOT_MEASURED = "Not measured yet."

Entry = dict[str, Any]


def read_lines(name: str) -> list[Entry]:
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def newest(entries: Iterable[Entry], *keys: str) -> list[Entry]:
    """The last entry of each combination of `keys` and device, in order of first appearance."""
    found: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        found[(*(entry[key] for key in keys), entry["machine"]["device"])] = entry
    return list(found.values())


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    align = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *rows])


def where(entries: list[Entry]) -> str:
    """One line that says on what the entries were measured."""
    machines = {
        f"{m['device']}, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, "
        f"torch {m['torch']}, clext {m['clext']} ({m['date'][:10]})"
        for m in (entry["machine"] for entry in entries)
    }
    return "Measured on " + "; ".join(sorted(machines)) + "."


def by_device(entries: list[Entry], head: list[str], row: Callable[[Entry], list[str]]) -> str:
    """A table for each device that was measured on, each followed by what it was."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry["machine"]["device"], []).append(entry)
    parts = [
        markdown(head, [row(e) for e in group]) + "\n\n" + where(group) for group in groups.values()
    ]
    return "\n\n".join(parts) or NOT_MEASURED


def times(ratio: float | None, digits: int = 1) -> str:
    return "" if ratio is None else f"{ratio:.{digits}f}x"
