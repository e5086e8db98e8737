"""Tables of what was learned: accuracies of runs, and published numbers beside ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from clext import Comparison, Result
from report.result_tables import NOT_MEASURED, RESULTS, Entry, markdown, newest, read_lines, where

if TYPE_CHECKING:
    from published.protocols import Row

_ENOUGH_TO_SCATTER = 3


def read_comparison() -> dict[str, Result]:
    return Comparison.load(RESULTS / "permuted_mnist").results


def accuracy_table() -> str:
    rows = []
    for name, result in read_comparison().items():
        strength = ", ".join(f"{value:g}" for value in result.strengths)
        average, worst = result.average_accuracy[-1], result.accuracy[-1].min()
        rows.append([f"`{name}`", strength, f"{average:.4f}", f"{worst:.4f}"])
    head = ["method", "strength", "average accuracy", "lowest at the end"]
    return markdown(head, rows)


def published_table() -> str:
    """A line for each published number, the mean over our runs beside it.

    Runs that were made before a row's options changed are left out.
    """
    from published.protocols import verdict
    from published.tables import PROTOCOLS

    rows = []
    for name in PROTOCOLS:
        for row, found in published_runs(name):
            values = accuracies(found)
            published = "" if row.published is None else f"{row.published:.2f}"
            rows.append(
                [
                    f"`{name}`",
                    row.name,
                    published + (f" +- {row.spread}" if row.spread else ""),
                    f"{row.tolerance:g}" if published else "",
                    mean_and_scatter(values) if values else "not run yet",
                    str(len(values) or ""),
                    verdict(row, fmean(values)) if values else "",
                    f"{fmean(e['seconds'] for e in found) / 60:.0f}" if found else "",
                ]
            )
    ours = "clext, % (+- standard deviation of the runs)"
    head = ["table", "row", "published, %", "tolerance", ours, "runs", "verdict", "minutes a run"]
    return markdown(head, rows)


def published_runs(name: str) -> Iterator[tuple[Row, list[Entry]]]:
    """Each row of the table `name`, with the runs of what it is now."""
    from published.tables import PROTOCOLS

    runs = newest(read_lines("published"), "name", "row", "method", "seed")
    for row in PROTOCOLS[name].rows:
        wanted = (name, row.name, row.described)
        yield row, [e for e in runs if (e["name"], e["row"], e["method"]) == wanted]


def accuracies(found: list[Entry]) -> list[float]:
    """One for each seed: again on another device it is no further sample."""
    return list({e["seed"]: e["accuracy"] for e in found}.values())


def kept_table() -> str:
    """What each method of DER's table keeps for later tasks, and how well it does with that."""
    rows = [
        [row.name, f"{size / 1e6:.2f}", mean_and_scatter(accuracies(found)), str(len(found))]
        for row, found, size in kept_bytes()
    ]
    return markdown(["row", "kept, MB", "accuracy, %", "runs"], rows) if rows else NOT_MEASURED


def kept_bytes() -> list[tuple[Row, list[Entry], int]]:
    """The rows of DER's table by the bytes that they keep, with their runs."""
    measured = [
        (row, found, max(e.get("kept_bytes", -1) for e in found))
        for row, found in published_runs("der2020")
        if found
    ]
    return sorted((entry for entry in measured if entry[2] >= 0), key=lambda entry: entry[2])


def mean_and_scatter(values: list[float]) -> str:
    """The mean; of enough values to tell, also how far single ones lie from it."""
    scatter = f" +- {stdev(values):.1f}" if len(values) >= _ENOUGH_TO_SCATTER else ""
    return f"{fmean(values):.2f}{scatter}"


def course_table() -> str:
    """A method's rows side by side: the course's formula, parts of it, the paper's."""
    head = [
        "method",
        "formula",
        "strength",
        "tasks x epochs",
        "average accuracy",
        "lowest at the end",
    ]

    def row(e: Entry) -> list[str]:
        return [
            f"`{e['method']}`",
            e["formula"],
            f"{e['strength']:g}",
            f"{e['tasks']} x {e['epochs']}",
            f"{e['average_accuracy'][-1]:.4f}",
            f"{min(e['final_accuracy']):.4f}",
        ]

    # Accuracies do not depend on the device, but for chance: the newest run counts.
    runs = read_lines("course")
    entries = list({(e["method"], e["formula"], e["strength"]): e for e in runs}.values())
    methods = list(dict.fromkeys(e["method"] for e in entries))
    rows = [row(e) for e in sorted(entries, key=lambda e: methods.index(e["method"]))]
    return f"{markdown(head, rows)}\n\n{where(entries)}" if rows else NOT_MEASURED


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


def optimizer_importance_table() -> str:
    """EWC by the empirical Fisher and by Adam's second moment, at several strengths."""
    entries = read_lines("optimizer_importance")
    runs = [e for e in entries if "fisher" in e]
    if not runs:
        return NOT_MEASURED

    def mean(found: list[Entry], key: str) -> str:
        values = [100 * e[key] for e in found]
        return mean_and_scatter(values)

    rows = []
    for fisher, strength in sorted({(e["fisher"] or "", e["strength"]) for e in runs}):
        found = [e for e in runs if (e["fisher"] or "", e["strength"]) == (fisher, strength)]
        rows.append(
            [
                f'EWC, `"{fisher}"`' if fisher else "plain fine-tuning",
                f"{strength:g}" if fisher else "",
                mean(found, "average_accuracy"),
                mean(found, "learning_accuracy"),
                f"{1000 * fmean(e['consolidate_seconds'] for e in found):.0f}" if fisher else "",
            ]
        )
    head = ["`fisher=`", "strength", "all tasks at the end, %", "just learned, %"]
    pairs = [e for e in entries if "comparison" in e]
    facts = [fmean(e[key] for e in pairs) for key in ("correlation", "rank_correlation")]
    ratio = fmean(e["fisher_by_moment"] for e in pairs)
    return (
        f"{markdown([*head, 'consolidate, ms a task'], rows)}\n\n"
        f"After the first task the two correlate by {facts[0]:.3f} (their ranks by "
        f"{facts[1]:.3f}), and the empirical Fisher is {ratio:.0f} times the second moment at "
        f"batches of 128. Means of {len(pairs)} seeds. {where(runs)}"
    )


def encoder_table() -> str:
    """A pre-trained encoder after two text tasks, by what was done against forgetting."""
    entries = {(e["method"], e["seed"]): e for e in read_lines("encoder")}.values()
    if not entries:
        return NOT_MEASURED

    def percent(found: list[Entry], value: Callable[[Entry], float]) -> str:
        return mean_and_scatter([100 * value(e) for e in found])

    def mean(found: list[Entry], value: Callable[[Entry], float]) -> float:
        return fmean(value(e) for e in found)

    rows = []
    for name in dict.fromkeys(e["method"] for e in entries):
        found = [e for e in entries if e["method"] == name]
        strength = found[0]["strength"]
        rows.append(
            [
                name,
                "" if strength is None else f"{strength:g}",
                percent(found, lambda e: e["accuracy"][1][0]),
                percent(found, lambda e: e["accuracy"][1][1]),
                f"{100 * mean(found, lambda e: fmean(e['accuracy'][1])):.1f}",
                percent(found, lambda e: e["others"][2]["accuracy"]),
                f"{mean(found, lambda e: e['others'][2]['cosine']):.2f}",
                f"{mean(found, lambda e: e['seconds'][1]):.0f}",
                f"{mean(found, lambda e: e['consolidate_seconds']):.1f}",
                f"{mean(found, lambda e: e['method_bytes']) / 1e6:.0f}",
                f"{mean(found, lambda e: e['optimizer_bytes']) / 1e6:.0f}",
            ]
        )
    before, after = [
        100 * mean([*entries], lambda e, i=i: e["others"][i]["accuracy"]) for i in range(2)
    ]
    learned = 100 * mean([*entries], lambda e: e["accuracy"][0][0])
    cosine = mean([*entries], lambda e: e["others"][1]["cosine"])
    head = [
        *("second task by", "strength", "first task, %", "second task, %", "both, %"),
        *(
            "other texts, %",
            "cosine",
            "steps, s",
            "consolidate, s",
            "method's state, MB",
            "optimizer's, MB",
        ),
    ]
    return (
        f"{markdown(head, rows)}\n\n"
        f"Before: first task just learned {learned:.1f} %, other texts {before:.1f} % by the "
        f"original encoder and {after:.1f} % after the first task (cosine {cosine:.2f}). Means of "
        f"{len({e['seed'] for e in entries})} seeds; seconds of one core, of the second task's 24 "
        "steps and of `consolidate`. "
        f"{where([*entries])}"
    )


def compared() -> list[Entry]:
    """The runs of `clext compare`, as entries of the sweep."""
    entries = []
    for name, result in read_comparison().items():
        config = result.config
        entries.append(
            {
                "method": name,
                "strength": config["strength"] or 0.0,  # null where there is none
                "options": config["method_options"],
                "seed": config["seed"],
                "average_accuracy": result.average_accuracy,
            }
        )
    return entries
