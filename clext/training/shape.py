"""The shape of a result's file: whoever wrote it, what is loaded can be shown and drawn."""

from __future__ import annotations

import re
import reprlib
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
    "curve": [_NUMBER],
    "steps": [{"task": int, "step": int, "accuracy": [_NUMBER]}],
    "timings": {str: int | float},
    "stopped": str | None,
}
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
