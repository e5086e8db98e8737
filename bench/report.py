"""Writes the tables of README.md and bench/README.md from bench/results: `python bench/report.py`.

With --check nothing is written; the exit code is 1 where a table differs from the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "bench" / "README.md"]
MODEL_NAMES = {"mlp": "course MLP, 1.5 M", "resnet18": "ResNet-18, 11.7 M", "vit_b": "ViT-B, 86 M"}

Entry = dict[str, Any]


def read_lines(name: str) -> list[Entry]:
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def read_comparison() -> dict[str, Entry]:
    file = RESULTS / "permuted_mnist" / "comparison.json"
    results: dict[str, Entry] = json.loads(file.read_text())["results"]
    return results


def newest(entries: Iterable[Entry], *keys: str) -> list[Entry]:
    """The last entry of each combination of `keys` and device, in order of first appearance."""
    found: dict[tuple[Any, ...], Entry] = {}
    for entry in entries:
        found[(*(entry[key] for key in keys), entry["machine"]["device"])] = entry
    return list(found.values())


def markdown(head: list[str], rows: list[list[str]]) -> str:
    align = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *rows])


def where(entries: list[Entry]) -> str:
    """One line that says on what the entries were measured."""
    machines = {
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, clext {m['clext']} "
        f"({m['date'][:10]})"
        for m in (entry["machine"] for entry in entries)
    }
    return "Measured on " + "; ".join(sorted(machines)) + "."


def accuracy_table() -> str:
    rows = []
    for name, result in read_comparison().items():
        final = [a for a in result["accuracy"][-1] if a is not None]
        worst = min(final)
        strength = f"{result['config']['strength']:g}"
        rows.append([f"`{name}`", strength, f"{sum(final) / len(final):.4f}", f"{worst:.4f}"])
    head = ["method", "strength", "average accuracy", "worst task"]
    return markdown(head, rows)


def penalty_table() -> str:
    entries = newest(read_lines("ops"), "op", "model")
    entries = [e for e in entries if e["op"] == "add_quadratic_penalty_grad_"]
    rows = [
        [
            MODEL_NAMES[e["model"]],
            f"{e['ms']['clext']:.2f}",
            *(f"{e['ratio'][name]:.1f}x" for name in ("loop", "foreach", "compile")),
            f"{1 / e['ratio']['copy']:.2f}x",
        ]
        for e in entries
    ]
    head = [
        "model",
        "clext, ms",
        "autograd loop",
        "`torch._foreach`",
        "`torch.compile`",
        "of a copy",
    ]
    return markdown(head, rows) + "\n\n" + where(entries)


def ops_table() -> str:
    entries = newest(read_lines("ops"), "op", "model")
    rows = []
    for e in entries:
        ratios = [
            f"{e['ratio'][n]:.1f}x" if n in e["ratio"] else ""
            for n in ("loop", "foreach", "compile")
        ]
        rows.append(
            [
                f"`{e['op']}`",
                e["model"],
                f"{e['bytes'] / e['elements']:.0f}",
                f"{e['ms']['clext']:.3f}",
                f"{e['gb_per_s']:.0f}",
                f"{100 * e['share_of_copy_bandwidth']:.0f}%",
                *ratios,
            ]
        )
    head = ["op", "model", "bytes/element", "ms", "GB/s", "of copy", "loop", "foreach", "compile"]
    return markdown(head, rows) + "\n\n" + where(entries)


def step_table() -> str:
    entries = newest(read_lines("step"), "model")
    rows = [
        [f"`{name}`", f"{ms:.2f}", f"{e['against_baseline'][name]:.2f}x"]
        for e in entries
        for name, ms in e["ms"].items()
    ]
    return markdown(["method", "ms a step", "of baseline"], rows) + "\n\n" + where(entries)


def plan_table() -> str:
    entries = newest(read_lines("plan"), "tensors")
    rows = [[str(e["tensors"]), f"{e['us']['plan']:.1f}", f"{e['us']['op']:.1f}"] for e in entries]
    return (
        markdown(["tensors", "ParameterPlan, us", "dispatcher op, us"], rows)
        + "\n\n"
        + where(entries)
    )


def sweep_table() -> str:
    runs = read_lines("sweep") + compared()
    # Deterministic, so a second run of the same settings says nothing new.
    entries = {(e["method"], e["strength"], str(e["options"]), e["seed"]): e for e in runs}.values()
    rows = [
        [
            f"`{e['method']}`",
            f"{e['strength']:g}",
            ", ".join(f"{k}={v}" for k, v in e["options"].items() if k != "seed"),
            str(e["seed"]),
            f"{e['average_accuracy'][-1]:.4f}",
        ]
        for e in sorted(entries, key=lambda e: (e["method"], e["strength"], e["seed"]))
    ]
    return markdown(["method", "strength", "options", "seed", "average accuracy"], rows)


def compared() -> list[Entry]:
    """The runs of `clext compare`, as entries of the sweep."""
    entries = []
    for name, result in read_comparison().items():
        config = result["config"]
        final = [a for a in result["accuracy"][-1] if a is not None]
        entries.append(
            {
                "method": name,
                "strength": config["strength"],
                "options": config["method_options"],
                "seed": config["seed"],
                "average_accuracy": [sum(final) / len(final)],
            }
        )
    return entries


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy_table,
    "penalty": penalty_table,
    "ops": ops_table,
    "step": step_table,
    "plan": plan_table,
    "sweep": sweep_table,
}


def filled(text: str) -> str:
    """`text` with every `<!-- table NAME -->...<!-- end -->` block written anew."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


@click.command(help=__doc__)
@click.option("--check", is_flag=True, help="Compare only.")
def report(check: bool) -> None:
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        if filled(text) != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(filled(text))
    if check and stale:
        raise SystemExit(
            f"{', '.join(stale)}: tables differ from bench/results; run bench/report.py"
        )
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")


if __name__ == "__main__":
    report()
