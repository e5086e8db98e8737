"""What the command line is given in words, read without torch."""

from __future__ import annotations

import ast
from itertools import islice
from typing import Any

from clext.core.names import DEFAULT_METHODS, part_names

_MOST_SEEDS = 100_000
_LONGEST_OPTION = 1000  # signs; what is nested deeper than Python can read is longer


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs, a value being a Python literal (0.9, 5, True) or else the text itself."""
    parsed: dict[str, Any] = {}
    for option in options:
        name, equals, text = option.partition("=")
        if not (name and equals and text):
            raise ValueError(f"--option {option}: expected NAME=VALUE")
        if len(option) > _LONGEST_OPTION:
            raise ValueError(
                f"--option {option[:20]}...: expected at most {_LONGEST_OPTION} signs, got "
                f"{len(option):,}"
            )
        try:
            parsed[name.strip().replace("-", "_")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            parsed[name.strip().replace("-", "_")] = text
    return parsed


def parse_strengths(given: tuple[str, ...]) -> list[float] | dict[str, list[float]] | None:
    """The strengths in "1,10" for all methods, or in "ewc=1,10" and others for one each."""
    by_method: dict[str, list[float]] = {}
    for text in given:
        method, equals, values = text.rpartition("=")
        try:
            numbers = [float(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(
                f"--strengths {text}: expected numbers such as 1,10,100 or ewc=1,10,100"
            ) from None
        if not equals and len(given) > 1:
            raise ValueError(
                f"--strengths {text}: expected METHOD={text}, as strengths are given several times"
            )
        if not equals:
            return numbers
        by_method[method] = numbers
    return by_method or None


def parse_seeds(text: str) -> list[int]:
    """The seeds in "0-4", "3" or "0-2,7"; of a long range only more than a sweep takes."""
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            seeds += islice(range(int(first), int(last or first) + 1), _MOST_SEEDS)
        except ValueError:
            raise ValueError(f"--seeds {text}: expected seeds such as 0-4 or 0,1,7") from None
    if not seeds:
        raise ValueError(f"--seeds {text}: expected seeds such as 0-4 or 0,1,7, got none")
    return seeds


def method_labels(names: str | None) -> list[str]:
    """The methods in "ewc,ewc+replay", each as a label; by default those of `compare`."""
    chosen = [*DEFAULT_METHODS] if names is None else names.split(",")
    return ["+".join(part_names(name)) for name in chosen]


def options_by_method(options: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """METHOD.NAME=VALUE pairs, as `compare` and `sweep` take them."""
    by_method: dict[str, dict[str, Any]] = {}
    for name, value in parse_options(options).items():
        method, dot, option = name.partition(".")
        if not dot:
            raise ValueError(f"--option {name}: expected METHOD.NAME=VALUE")
        by_method.setdefault(method, {})[option] = value
    return by_method
