"""Writes the tables of README.md and bench/README.md from bench/results: `python bench/report.py`.

With --check nothing is written; the exit code is 1 where a table differs from the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "bench" / "README.md"]
NAMES = {"torch": "plain torch"}
CONTESTANTS = ("clext", "course")
MODEL_NAMES = {"mlp": "course MLP, 1.5 M", "resnet18": "ResNet-18, 11.7 M", "vit_b": "ViT-B, 86 M"}

NOT_MEASURED = "Not measured yet."

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
    head = [
        "model",
        "clext, ms",
        "autograd loop",
        "`torch._foreach`",
        "`torch.compile`",
        "of a copy",
    ]

    def row(e: Entry) -> list[str]:
        return [
            MODEL_NAMES[e["model"]],
            f"{e['ms']['clext']:.2f}",
            *(times(e["ratio"][name]) for name in ("loop", "foreach", "compile")),
            f"{1 / e['share_of_copy_bandwidth']:.2f}x",
        ]

    chosen = [e for e in entries if e["op"] == "add_quadratic_penalty_grad_"]
    return by_device(chosen, head, row)


def traffic_table() -> str:
    """From the definitions of the benchmarks, not from results."""
    from cases import CASES
    from steppers import CLEXT_OPTIMIZERS, METHOD_LISTS, least_traffic

    counts = {f"`{op}`": (case.reads, case.writes) for op, case in CASES.items()}
    for optimizer in CLEXT_OPTIMIZERS:
        for method in METHOD_LISTS:
            counts[step_name(optimizer, method)] = least_traffic(optimizer, method)
    rows = [
        [name, str(reads), str(writes), str(4 * (reads + writes))]
        for name, (reads, writes) in counts.items()
    ]
    return markdown(["op", "read", "written", "bytes/element"], rows)


def step_name(optimizer: str, method: str) -> str:
    return f"`{optimizer}_step_`" + ("" if method == "none" else f", {method}")


def ops_table() -> str:
    head = [
        "op",
        "model",
        "bytes/element",
        "ms",
        "GB/s",
        "of copy bandwidth",
        "loop",
        "foreach",
        "compile",
    ]

    def row(e: Entry) -> list[str]:
        return [
            f"`{e['op']}`",
            e["model"],
            f"{e['bytes'] / e['elements']:.0f}",
            f"{e['ms']['clext']:.3f}",
            f"{e['gb_per_s']:.0f}",
            f"{100 * e['share_of_copy_bandwidth']:.0f}%",
            *(times(e["ratio"].get(name)) for name in ("loop", "foreach", "compile")),
        ]

    return by_device(newest(read_lines("ops"), "op", "model"), head, row)


def fused_table() -> str:
    """The README's part of the table `optim`: Adam with SI."""
    entries = newest(read_lines("optim"), "optimizer", "method", "model")
    head = ["model", "clext, ms", "separate passes", "course loops", "of a copy"]

    def row(e: Entry) -> list[str]:
        return [
            MODEL_NAMES[e["model"]],
            f"{e['ms']['fused']:.2f}",
            times(e["ratio"]["separate"]),
            times(e["ratio"]["course"]),
            f"{1 / e['share_of_copy_bandwidth']:.2f}x",
        ]

    chosen = [e for e in entries if (e["optimizer"], e["method"]) == ("adam", "si")]
    return by_device(chosen, head, row)


def optim_table() -> str:
    head = [
        "step",
        "model",
        "bytes/element",
        "ms",
        "of copy bandwidth",
        "separate passes",
        "course loops",
    ]

    def row(e: Entry) -> list[str]:
        return [
            step_name(e["optimizer"], e["method"]),
            e["model"],
            f"{e['bytes'] / e['elements']:.0f}",
            f"{e['ms']['fused']:.3f}",
            f"{100 * e['share_of_copy_bandwidth']:.0f}%",
            times(e["ratio"]["separate"], 2),
            times(e["ratio"]["course"]),
        ]

    return by_device(newest(read_lines("optim"), "optimizer", "method", "model"), head, row)


def protocol_table() -> str:
    head = [
        "method",
        "tasks x epochs",
        "precision",
        "clext, s",
        "course loop, s",
        "faster",
        "accuracy",
        "of the course loop",
    ]

    def row(e: Entry) -> list[str]:
        course = e["seconds"].get("course")
        return [
            f"`{e['method']}`",
            f"{e['tasks']} x {e['epochs']}",
            e["precision"],
            f"{e['seconds']['clext']:.1f}",
            "" if course is None else f"{course:.1f}",
            times(e["ratio"]),
            *("" if not a else f"{fmean(a):.4f}" for a in map(e["accuracy"].get, CONTESTANTS)),
        ]

    keys = ("method", "tasks", "epochs", "precision")
    return by_device(newest(read_lines("protocol"), *keys), head, row)


def step_table() -> str:
    """A line for each method, the precisions side by side; one table for each device."""
    runs = newest(({"precision": "fp32", **e} for e in read_lines("step")), "model", "precision")
    devices: dict[str, list[Entry]] = {}
    for e in runs:
        devices.setdefault(e["machine"]["device"], []).append(e)
    parts = []
    for entries in devices.values():
        head = ["method"]
        rows = {name: [NAMES.get(name, f"`{name}`")] for e in entries for name in e["ms"]}
        for e in entries:
            head += [f"{e['precision']}, ms a step", "of baseline"]
            for name, cells in rows.items():
                measured = name in e["ms"]
                cells.append(f"{e['ms'][name]:.2f}" if measured else "")
                cells.append(times(e["against_baseline"].get(name), 2))
        parts.append(markdown(head, list(rows.values())) + "\n\n" + where(entries))
    return "\n\n".join(parts) or NOT_MEASURED


def course_table() -> str:
    """A method's rows side by side: the course's formula, parts of it, the paper's."""
    head = ["method", "formula", "strength", "tasks x epochs", "average accuracy", "worst task"]

    def row(e: Entry) -> list[str]:
        return [
            f"`{e['method']}`",
            e["formula"],
            f"{e['strength']:g}",
            f"{e['tasks']} x {e['epochs']}",
            f"{e['average_accuracy'][-1]:.4f}",
            f"{min(e['final_accuracy']):.4f}",
        ]

    entries = newest(read_lines("course"), "method", "formula", "strength")
    methods = list(dict.fromkeys(e["method"] for e in entries))
    return by_device(sorted(entries, key=lambda e: methods.index(e["method"])), head, row)


def course_sizes_table() -> str:
    def row(e: Entry) -> list[str]:
        course, paper = e["mean"]["course"], e["mean"]["paper"]
        return [f"`{e['method']}`", f"{course:.2g}", f"{paper:.2g}", f"{paper / course:.1f}"]

    head = ["class", "mean importance, course", "paper", "times smaller"]
    return by_device(newest(read_lines("course_sizes"), "method"), head, row)


def course_step_table() -> str:
    return by_device(
        newest(read_lines("course_step"), "method"),
        ["class", "notebook, ms", "clext.course, ms", "faster"],
        lambda e: [
            f"`{e['method']}`",
            *(f"{e['ms'][name]:.2f}" for name in ("notebook", "clext")),
            times(e["ratio"]),
        ],
    )


def plan_table() -> str:
    return by_device(
        newest(read_lines("plan"), "tensors"),
        ["tensors", "ParameterPlan, us", "dispatcher op, us"],
        lambda e: [str(e["tensors"]), f"{e['us']['plan']:.1f}", f"{e['us']['op']:.1f}"],
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
    "traffic": traffic_table,
    "ops": ops_table,
    "fused": fused_table,
    "optim": optim_table,
    "protocol": protocol_table,
    "step": step_table,
    "plan": plan_table,
    "course": course_table,
    "course_sizes": course_sizes_table,
    "course_step": course_step_table,
    "sweep": sweep_table,
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
        raise SystemExit(f"{names}: tables differ from bench/results; run bench/report.py")
    for path in paths:
        path.write_text(filled(path.read_text()))
    print(f"{'stale' if check else 'written'}: {names}")


if __name__ == "__main__":
    report()
