"""What `clext info` says: of a method its docstring, options and memory; of the machine."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clext.core.names import part_names
from clext.core.seeding import generator
from clext.data.datasets import whereabouts
from clext.methods import METHODS, Method, make_method
from clext.methods.parts.options import option_names
from clext.methods.parts.state import CONSOLIDATED
from clext.methods.quadratic import QuadraticPenalty
from clext.ops._extension import build_info
from clext.training.models import mlp
from clext.training.tables import hanging

_EXAMPLES = 1000
_PENALTY = """
Penalty, beside the task's loss:
  strength * sum over parameters of importance * (parameter - anchor)^2"""


def describe_method(method: str) -> str:
    """What there is to say about a method, or a combination such as "ewc+replay".

    Raises:
        ValueError: an unknown name, or two methods that do not combine.
    """
    names = part_names(method)
    make_method(names, torch.nn.Linear(1, 1))  # if they combine
    return "\n\n".join(_describe(METHODS[name]) for name in names)


def describe_everything(data_dir: str | None) -> str:
    """How clext was built, what the machine has, where data comes from, methods and options."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none found"
    sections = {
        "build": {key: _text(value) for key, value in build_info().items()},
        "machine": {"threads": str(torch.get_num_threads()), "cuda device": gpu},
        "data": whereabouts(data_dir),
        "methods": {
            name: " ".join(f"{option}={value}" for option, value in option_values(kind).items())
            for name, kind in METHODS.items()
        },
    }
    lines = []
    for title, rows in sections.items():
        lines += [f"{title}:", *(hanging(f"  {name:<14} ", rows[name] or "-") for name in rows)]
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None or value == "" else str(value)


def option_values(kind: type[Method]) -> dict[str, str]:
    """The options as they would be given to `--option`: defaults, or all values, default first."""
    parameters = inspect.signature(kind).parameters
    defaults = {name: str(parameters[name].default) for name in option_names(kind)}
    if kind.has_strength:
        defaults["strength"] = f"{kind.default_strength:g}"
    return defaults | {name: "|".join(values) for name, values in kind.choices.items()}


def _describe(kind: type[Method]) -> str:
    title = (sys.modules[kind.__module__].__doc__ or "").partition("\n")[0]
    options = [f"  {name}={value}" for name, value in option_values(kind).items()]
    kept = {name: size for name, size in bytes_after_a_task(kind).items() if size}
    sizes = {**kept, "together": sum(kept.values())} if len(kept) > 1 else kept
    memory = [f"  {name:<20}{_readable(size):>12}" for name, size in sizes.items()]
    return "\n".join(
        [
            f"{kind.name}: {title}",
            "",
            inspect.getdoc(kind) or "",
            *([_PENALTY] if issubclass(kind, QuadraticPenalty) else []),
            "",
            "Options (--option NAME=VALUE; the default, or all values, the default first):",
            *(options or ["  none"]),
            "",
            f"State of the model mlp after a task of {_EXAMPLES:,} images like MNIST's:",
            *(memory or ["  nothing"]),
            *_per_parameter(kind),
        ]
    )


def bytes_after_a_task(kind: type[Method]) -> dict[str, int]:
    """What a method has in its state dict after a task -> bytes."""
    random = generator(0)
    method = kind(mlp(random=random))
    examples = torch.rand(_EXAMPLES, 784, generator=random), torch.arange(_EXAMPLES) % 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was taken
        begun = method.begin_task(examples, block=range(10)) or examples
        for rows in torch.arange(_EXAMPLES).split(100):  # some keep what a loss is given
            method.loss(*(entry[rows] for entry in begun))
        method.consolidate([examples])
    state = method.state_dict()
    return {
        name: sum(tensor.nbytes for tensor in _tensors(entry))
        for part in ("state", "extra")
        for name, entry in state.get(part, {}).items()
    }


def _per_parameter(kind: type[Method]) -> list[str]:
    """What a method keeps for each parameter, if it does, in words."""
    names = getattr(kind, "state_names", ())
    if not names or "state_dtype" not in option_names(kind):
        return []
    size, saved = 4 * len(names), 2 * len(CONSOLIDATED)
    return [
        f"  {size} bytes for each float32 parameter, {size - saved} with state_dtype=bfloat16",
    ]


def _tensors(entry: Any) -> Iterator[Tensor]:  # noqa: ANN401  (of a state dict)
    if isinstance(entry, Tensor):
        yield entry
    elif isinstance(entry, dict | list | tuple):
        for value in entry.values() if isinstance(entry, dict) else entry:
            yield from _tensors(value)


def _readable(size: int) -> str:
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log(size, 1024)), 3)
    return f"{size / 1024**power:.1f} {['', 'KiB', 'MiB', 'GiB'][power]}"
