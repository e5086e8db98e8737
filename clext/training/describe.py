"""What a method is, in words and numbers: its options, and what it keeps in memory."""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
from typing import TYPE_CHECKING

import torch
from torch import nn

from clext.core.seeding import isolated_rng
from clext.methods import METHODS, Method, make_method, part_names
from clext.methods.base import option_names
from clext.training.models import mlp

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clext.methods.learning import Learning

# What the letters of `Stateful.memory` stand for.
LETTERS = {
    "P": "trainable parameters",
    "Q": "numbers in buffers of the model",
    "T": "tasks ended",
    "N": "examples of a task",
    "X": "numbers in an example",
    "O": "outputs of the model",
    "B": "the option budget",
    "M": "the option per_task",
    "G": "parameters of the generator",
}
_MNIST = {"T": 5, "N": 60_000, "X": 784, "O": 10}
_NAME_WIDTH, _VALUE_WIDTH, _FORMULA_WIDTH, _LINE_WIDTH = 20, 28, 28, 100


def describe_method(method: str) -> str:
    """One screen about a method, or a combination such as "ewc+replay".

    Raises:
        ValueError: an unknown name, or two methods that do not combine.
    """
    names = part_names(method)
    with isolated_rng(0, torch.device("cpu")):
        model = mlp()
        made = make_method(names, model)
        # What depends on the data (a generator, say) is made when a task begins.
        made.begin_task((torch.zeros(1, _MNIST["X"]), torch.zeros(1, dtype=torch.int64)))
    blocks = [_describe_part(part, model) for part in made.parts]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def option_values(kind: type[Method]) -> dict[str, str]:
    """The options as they would be given to `--option`: defaults, or all values, default first."""
    parameters = inspect.signature(kind).parameters
    defaults = {name: str(parameters[name].default) for name in option_names(kind)}
    if kind.has_strength:
        defaults["strength"] = f"{kind.default_strength:g}"
    return defaults | {name: "|".join(values) for name, values in kind.choices.items()}


def option_meanings(kind: type[Method]) -> dict[str, str]:
    """What each argument is, as far as its first phrase in the docstring of the class goes."""
    section = (inspect.getdoc(kind) or "").partition("\nArgs:\n")[2]
    section = re.split(r"\n(?=\S)", section)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
    texts = {name: " ".join(text.split()).replace("`", "") for name, text in entries}
    return {name: re.split(r"[;.](?: |$)", text)[0] for name, text in texts.items()}


def memory_formulas(part: Learning) -> dict[str, str]:
    """What a method keeps -> bytes as an expression in `LETTERS`, for parameters in float32.

    Of a combination each part has its own. What an optimizer of `clext.optim` makes superfluous is
    left out once the method was given to one.
    """
    state = dict.fromkeys(part._kept_names(), "4*P")
    return {**state, **part.memory}


def memory_bytes(formula: str, values: Mapping[str, int]) -> int:
    """What an expression of `memory_formulas` gives for the letters in it."""
    return int(eval(formula, {"__builtins__": {}, "min": min, "max": max}, dict(values)))


def letters_of(part: Learning, model: nn.Module) -> dict[str, int]:
    """The letters that the method and its model tell: all but those of the data, T, N, X and O.

    G is known from the first task on.
    """
    known = {
        "P": sum(entry.numel() for entry in model.parameters() if entry.requires_grad),
        "Q": sum(buffer.numel() for buffer in model.buffers()),
    }
    for letter, option in (("B", "budget"), ("M", "per_task")):
        if hasattr(part, option):
            known[letter] = getattr(part, option)
    generator = getattr(part, "generator", None)
    if isinstance(generator, nn.Module):
        known["G"] = sum(entry.numel() for entry in generator.parameters())
    return known


def _describe_part(part: Method | Learning, model: nn.Module) -> list[str]:
    kind = METHODS[part.name]
    title = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
    first = (inspect.getdoc(kind) or "").partition("\n\n")[0]
    lines = [f"{part.name}: {title}", *(f"  {line}" for line in first.splitlines()), ""]
    lines.append("options (--option NAME=VALUE; the default, or all values, the default first):")
    lines += _describe_options(kind) or ["  none"]
    return [*lines, "", *_describe_memory(part, model)]


def _describe_options(kind: type[Method]) -> list[str]:
    meanings, lines = option_meanings(kind), []
    for name, value in option_values(kind).items():
        start = f"  {name:<{_NAME_WIDTH}} {value:<{_VALUE_WIDTH}} "
        indent = " " * (4 + _NAME_WIDTH + _VALUE_WIDTH)
        lines += textwrap.wrap(
            meanings[name],
            _LINE_WIDTH,
            initial_indent=start,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
    return lines


def _describe_memory(part: Learning, model: nn.Module) -> list[str]:
    formulas = memory_formulas(part)
    if not formulas:
        return ["memory beside the model's: none"]
    values = {**_MNIST, **letters_of(part, model)}
    lines = ["memory beside the model's, in bytes; for the course's model after 5 tasks of MNIST:"]
    sizes = {}
    for name, formula in formulas.items():
        sizes[name] = memory_bytes(formula, values)
        text = f"  {name:<{_NAME_WIDTH}} {formula:<{_FORMULA_WIDTH}}"
        note = "  (not with an optimizer of clext.optim)" if name in part.separate_state else ""
        lines.append(f"{text} {_readable(sizes[name]):>12}{note}")
    if len(sizes) > 1:
        total = _readable(sum(sizes.values()))
        lines.append(f"  {'together':<{_NAME_WIDTH}} {'':<{_FORMULA_WIDTH}} {total:>12}")
    used = dict.fromkeys(letter for entry in formulas.values() for letter in _letters_in(entry))
    return [
        *lines,
        "letters:",
        *(f"  {letter} = {values[letter]:,}: {LETTERS[letter]}" for letter in used),
    ]


def _letters_in(formula: str) -> list[str]:
    return [letter for letter in LETTERS if letter in formula]


def _readable(size: int) -> str:
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log(size, 1024)), 3)
    return f"{size / 1024**power:.1f} {['', 'KiB', 'MiB', 'GiB'][power]}"
