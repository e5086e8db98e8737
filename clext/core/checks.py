"""Checks of user-given options: one clear sentence for a bad value, the nearest name for a typo."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable
from itertools import islice
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

# No torch before it is needed: the command line says what is wrong without waiting for it.


def unknown_name(kind: str, name: object, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not one of `valid`, with the nearest one suggested."""
    names = list(valid)
    listed = ", ".join(repr(candidate) for candidate in names) or "none"
    return ValueError(f"unknown {kind} {name!r}{suggestion(name, names)} (valid: {listed})")


def suggestion(name: object, valid: Iterable[str]) -> str:
    """What is nearest to `name`, as the end of a sentence; or nothing."""
    by_lower = {candidate.lower(): candidate for candidate in valid}
    word = str(name).lower()
    # As most papers and libraries call it, those of DER the latter.
    if re.search("(^|_)lam(bda)?(_|$)|^alpha$", word):
        word = "strength"
    nearest = difflib.get_close_matches(word, by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[nearest[0]]!r}?" if nearest else ""


def choice(owner: str, option: str, value: object, valid: Iterable[str]) -> str:
    """`value` if it is one of `valid`, else ValueError with the nearest one suggested."""
    names = list(valid)
    if isinstance(value, str) and value in names:
        return value
    raise unknown_name(f"value of option '{option}' of {owner}:", value, names)


# Of normal numbers in float32, in which state is kept: what is smaller may be zero there.
SMALLEST = 2.0**-126


def number(
    owner: str,
    option: str,
    value: object,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    open_minimum: bool = False,
    open_maximum: bool = False,
) -> float:
    """`value` as a finite float between the bounds, else ValueError (an open bound is excluded)."""
    if type(value) is not bool and isinstance(value, Real):
        try:
            converted = float(value)
        except OverflowError:  # an int beyond all floats
            converted = math.inf
        above = converted > minimum if open_minimum else converted >= minimum
        below = converted < maximum if open_maximum else converted <= maximum
        if math.isfinite(converted) and above and below:
            return converted
    bounds = []
    if math.isfinite(minimum):
        bounds.append(f"{'>' if open_minimum else '>='} {minimum:g}")
    if math.isfinite(maximum):
        bounds.append(f"{'<' if open_maximum else '<='} {maximum:g}")
    expected = " ".join(["a finite number", " and ".join(bounds)]).strip()
    raise ValueError(f"{owner}: {option} must be {expected}, got {value!r}")


def softening(owner: str, temperature: object) -> float:
    """A temperature between 1e-4 and 1e4, beyond which float32 has too few digits of logits."""
    return number(owner, "temperature", temperature, minimum=1e-4, maximum=1e4)


def integer(owner: str, option: str, value: object, *, minimum: int) -> int:
    """`value` as an int that is at least `minimum`, else ValueError.

    From 1 on it counts what takes memory or time, of which no machine has for 2**40 (a million
    millions); a seed may be any.
    """
    below = math.inf if minimum < 1 else 2**40
    expected = f"an integer >= {minimum}"
    if type(value) is not bool and isinstance(value, Integral):
        if minimum <= int(value) < below:
            return int(value)
        expected += f" and < {below:,}" * (int(value) >= below)
    raise ValueError(f"{owner}: {option} must be {expected}, got {value!r}")


def check_memory(owner: str, option: str, value: object, numbers: int) -> None:
    """ValueError for a `value` that takes so many float32 numbers, more than the memory has."""
    needed, there = 4 * numbers, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"{owner}: {option}={value!r} takes at least {needed / 2**30:,.0f} GiB, more than the "
            f"{there / 2**30:,.0f} GiB of memory here; choose less"
        )


def count_or_all(owner: str, option: str, value: object) -> int | None:
    """`value` as an int >= 1, or None for all there are, else ValueError."""
    return None if value is None else integer(owner, option, value, minimum=1)


def listed(owner: str, argument: str, values: Any, most: int) -> list[Any]:  # noqa: ANN401
    """What is given, each once; ValueError if it is no list, or empty, or has more than `most`."""
    some = islice(values, most + 1) if isinstance(values, Iterable) else ()
    try:
        found = [*dict.fromkeys(some)]
    except TypeError:  # lists in the list
        found = []
    if not found or isinstance(values, str):
        raise ValueError(f"{owner}: expected {argument} as a list of numbers, got {values!r}")
    if len(found) > most:
        raise ValueError(f"{owner}: expected at most {most:,} {argument}, got more; choose fewer")
    return found


def flag(owner: str, option: str, value: object) -> bool:
    """`value` if it is a bool, else ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {option} must be True or False, got {value!r}")
    return value


def scalar(owner: str, option: str, value: object, **bounds: Any) -> float:  # noqa: ANN401
    """`value`, a number or a tensor of one, as a float within `bounds` (see `number`)."""
    from torch import Tensor

    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return number(owner, option, value, **bounds)


def learning_rate(owner: str, value: object) -> float | Tensor:
    """`value` as a float >= 0; a tensor of one float stays, so that others can change it."""
    from torch import Tensor

    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{owner}: lr must be a number or a float tensor of one element, got "
                f"{value.dtype} of shape {list(value.shape)}"
            )
        scalar(owner, "lr", value, minimum=0.0)
        return value
    return number(owner, "lr", value, minimum=0.0)


def refuse(owner: str, group: dict[str, Any], *options: str) -> None:
    """ValueError for options of torch's class that the fused step does not have."""
    for option in options:
        if flag(owner, option, group[option]):
            raise ValueError(
                f"{owner}: {option}=True is not supported by the fused step; use "
                f"torch.optim.{owner} with method.attach(optimizer)"
            )


def as_path(path: str | os.PathLike[str], argument: str) -> Path:
    """`path` with ~ as the home folder; ValueError if it is no path, or there is no such home."""
    try:
        return Path(path).expanduser()
    except TypeError:
        raise ValueError(f"{argument} must be a path, such as 'runs/ewc', got {path!r}") from None
    except RuntimeError:
        raise ValueError(
            f"{argument}: the home folder in {str(path)!r} is not known here; write the folder in "
            "full"
        ) from None
