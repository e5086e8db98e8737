"""Lines on stderr."""

from __future__ import annotations

import sys


def say(line: str) -> None:
    """Write one line to stderr without tearing a progress bar that is being drawn there."""
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)
