"""A result in words: its headline, the rows of its table, its metrics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from clext.training import tables

if TYPE_CHECKING:
    from clext.training.result import Result

_WIDEST_TABLE = 10


def result_text(result: Result) -> str:
    """A headline, the table and the metrics; it fits a terminal, also with many tasks."""
    lines = [headline(result)]
    if result.average_accuracy:
        lines += ["", *tables.text(accuracy_rows(result), ("accuracy on",))]
        lines += ["", *(tables.hanging("", line) for line in footer(result))]
    if result.stopped:
        lines += [tables.hanging("stopped early: ", result.stopped)]
    return "\n".join(lines)


def headline(result: Result) -> str:
    """What was learned, and how well."""
    config, average = result.config, result.average_accuracy
    what = f"{result.label} on {config.get('scenario', '')} {result.data_name}".rstrip()
    what += result.setting
    if config.get("precision", "fp32") != "fp32":
        what += f" in {config['precision']}"
    epochs = f"{config['epochs']} epoch{'s' if config['epochs'] != 1 else ''} each"
    if config.get("iterations"):
        epochs = f"{config['iterations']} steps each"
    part = "" if result.complete else f"{len(average)} of "
    done = f"after {part}{config['tasks']} task{'s' if config['tasks'] != 1 else ''}"
    done += f", {epochs}" if result.timings else ""
    value = f"average accuracy {average[-1]:.4f} {done}" if average else "no task finished"
    return f"{what}: {value}"


def accuracy_rows(result: Result) -> list[tables.Row]:
    """A row for each task learned: the accuracies on all up to it, unless they are too many."""
    tasks = len(result.average_accuracy)
    columns = range(tasks if tasks <= _WIDEST_TABLE else 0)
    return [
        {
            "accuracy on": f"after task {k + 1}",
            **{f"task {j + 1}": f"{result.accuracy[k, j]:.4f}" if j <= k else "" for j in columns},
            "average": f"{average:.4f}",
        }
        for k, average in enumerate(result.average_accuracy)
    ]


def footer(result: Result) -> list[str]:
    """The metrics that are known, and the time."""
    changes = [
        f"{name} {value:{form}}"
        for name, value, form in (
            ("forgetting", result.forgetting, ".4f"),
            ("backward transfer", result.backward_transfer, "+.4f"),
            ("forward transfer", result.forward_transfer, "+.4f"),
        )
        if not math.isnan(value)
    ]
    levels = [f"learning accuracy {result.learning_accuracy:.4f}"]
    if not math.isnan(result.worst_accuracy):
        levels.append(f"minimum accuracy {result.worst_accuracy:.4f} (lowest since learned)")
    spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.timings.items())
    time = [f"{result.seconds:.1f} s ({spent})"] if result.timings else []
    return [", ".join(parts) for parts in (changes, levels) if parts] + time
