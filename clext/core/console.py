"""Lines on stderr."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def has_terminal() -> bool:
    """Whether stderr is a terminal that a bar can be drawn on.

    In one without a height, as some containers make them, tqdm would draw nothing at all.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except (OSError, ValueError):  # not a file of the system, such as a notebook's
        return True


def shows_bars() -> bool:
    """Whether stderr is a terminal, or the output of a notebook's cell."""
    return has_terminal() or type(sys.stderr).__module__.startswith("ipykernel.")


def say(line: str) -> None:
    """Write one line to stderr without tearing a progress bar that is being drawn there.

    Work goes on where there is no stderr, or nobody reads it any more.
    """
    from tqdm import tqdm

    if sys.stderr is not None:
        with suppress(BrokenPipeError):
            tqdm.write(line, file=sys.stderr)
