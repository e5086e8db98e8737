"""The shape of files of results: whoever wrote it, what is loaded can be shown and drawn."""

from __future__ import annotations

import re
import reprlib
from itertools import chain
from typing import Any, cast

_NUMBER = int | float | None
_RESULT = {
    "config": {
        "method": str,
        "tasks": int,
        "epochs": int,
        "scenario": str,
        "incremental": str,
        "dataset": str,
        "precision": str,
        "strength": _NUMBER,
        "data": dict,
        "method_options": dict,
    },
    "accuracy": [[_NUMBER]],
    "before": [_NUMBER],
    "untrained": [_NUMBER],
    "curve": [int | float],
    "task_curve": [[int | float]],
    "chance": [int | float],
    "steps": [{"task": int, "step": int, "accuracy": [_NUMBER]}],
    "timings": {str: int | float},
    "stopped": str | None,
}
_SWEEP = {"runs": [list], "failed": {str: str}}
_RUN = {"method": str, "strength": int | float | None, "seed": int}
_OPTIONS_OF_PARTS = {str: {"strength": _NUMBER}}
# Pictures and tables write it as it stands.
_METHOD_NAME = r"[^\\${}\x00-\x1f]+"


def check_result(content: dict[str, Any]) -> None:
    """KeyError for a part that is missing, ValueError for one that is not what it must be."""
    check_shape(content, _RESULT, "")
    config, rows = content["config"], len(content["accuracy"])
    method, tasks, epochs = (config[name] for name in ("method", "tasks", "epochs"))
    if rows != tasks or min(tasks, epochs) < 1:
        raise ValueError(f"accuracy has {rows} rows, for {tasks} tasks of {epochs} epochs")
    if not re.fullmatch(_METHOD_NAME, method):
        raise ValueError(f"method is {reprlib.repr(method)}, expected a name")
    if "+" in method:
        check_shape(config.get("method_options", {}), _OPTIONS_OF_PARTS, "method_options")
    for number, row in enumerate(content.get("task_curve", [])):
        if len(row) != number // epochs + 1:
            raise ValueError(f"task_curve[{number}] has {len(row)} entries, for each task seen one")
    drawn = chain(content["curve"], content.get("chance", []), *content.get("task_curve", []))
    for value in drawn:
        if not 0 <= value <= 1:
            raise ValueError(f"an accuracy is {reprlib.repr(value)}, expected a fraction")


def check_sweep(content: dict[str, Any]) -> None:
    """The same for the file of a sweep, whose runs are [method, strength, seed] in folders."""
    runs = content["runs"], content["failed"]
    check_shape(content, _SWEEP, "")
    for number, run in enumerate(runs[0]):
        entries = dict(zip(_RUN, run, strict=True))
        check_shape(entries, _RUN, f"runs[{number}]")
        float(entries["strength"] or 0)  # OverflowError
        if not re.fullmatch(_METHOD_NAME, method := entries["method"]) or "/" in method:
            raise ValueError(f"runs[{number}].method is {reprlib.repr(method)}, expected a name")


def check_shape(value: object, shape: Any, place: str) -> None:  # noqa: ANN401
    """ValueError, which says where, if JSON values are not of a shape.

    A shape is a type or a union of types, [shape] for a list of any length, or {key: shape} for a
    dict, in which keys may be missing and others may be; {str: shape} is for any keys.
    """
    kind = type(shape) if isinstance(shape, dict | list) else shape
    if not isinstance(value, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{place} is {reprlib.repr(value)}, expected {expected}")
    if isinstance(shape, list):
        for number, entry in enumerate(cast("list[object]", value)):
            check_shape(entry, shape[0], f"{place}[{number}]")
    if isinstance(shape, dict):
        for key, entry in cast("dict[str, object]", value).items():
            if key in shape or str in shape:
                check_shape(entry, shape.get(key, shape.get(str)), f"{place}.{key}".lstrip("."))
