"""A result in words and numbers, as it is printed: a headline, the table, the metrics."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clext.training.result import Result

_WIDEST_TABLE = 10


def summary(result: Result) -> str:
    """The text of a result; it fits a terminal, also with many tasks."""
    lines = [_headline(result)]
    if result.average_accuracy:
        lines += ["", *_table(result), "", *_footer(result)]
    if result.stopped:
        lines += [f"stopped early: {result.stopped}"]
    return "\n".join(lines)


def _headline(result: Result) -> str:
    config, average = result.config, result.average_accuracy
    scenario = config.get("scenario", "")
    what = f"{result.label} on {scenario} {result.data_name}{result.setting}"
    if config.get("precision", "fp32") != "fp32":
        what += f" in {config['precision']}"
    epochs = f"{config['epochs']} epoch{'s' if config['epochs'] != 1 else ''} each"
    done = f"after {len(average)} of {config['tasks']} tasks, {epochs}"
    value = f"average accuracy {average[-1]:.4f} {done}" if average else "no task finished"
    return f"{what}: {value}"


def _table(result: Result) -> list[str]:
    tasks = len(result.average_accuracy)
    columns = tasks if tasks <= _WIDEST_TABLE else 0
    names = [f"task {j + 1}" for j in range(columns)]
    rows = [f"{'accuracy on':<14}" + "".join(f"{name:>9}" for name in [*names, "average"])]
    for k, average in enumerate(result.average_accuracy):
        cells = [f"{a:9.4f}" if j <= k else " " * 9 for j, a in enumerate(result.accuracy[k])]
        rows.append(f"{f'after task {k + 1}':<14}{''.join(cells[:columns])}{average:9.4f}")
    return rows


def _footer(result: Result) -> list[str]:
    lines = [
        [
            ("forgetting", result.forgetting, ".4f"),
            ("backward transfer", result.backward_transfer, "+.4f"),
            ("forward transfer", result.forward_transfer, "+.4f"),
        ],
        [
            ("learning accuracy", result.learning_accuracy, ".4f"),
            ("minimum accuracy", result.worst_accuracy, ".4f"),
        ],
    ]
    known = [
        [f"{name} {value:{form}}" for name, value, form in entries if not math.isnan(value)]
        for entries in lines
    ]
    if not math.isnan(result.worst_accuracy):
        known[-1][-1] += " (lowest since learned, mean of earlier tasks)"
    time = f"{result.seconds:.1f} s"
    if result.timings:
        spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result.timings.items())
        time += f" ({spent})"
    return [", ".join(parts) for parts in known if parts] + [time]
