"""How a command ends: its errors in one line each, and its exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import click

from clext.core.console import say

FAILED = 1
_WRONG_INPUT = 2
_INTERRUPTED = 130
_LONGEST_LINE = 1000


@contextmanager
def one_line_errors() -> Iterator[None]:
    """What went wrong in one line and an exit code, instead of a stack trace."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_args, **_kwargs: say(f"Warning: {message}")
        try:
            yield
        except BrokenPipeError:
            # Whoever read the results, such as `head`, has seen enough; they are saved by now. What
            # is flushed at the end goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        except KeyboardInterrupt as error:
            _stop("Interrupted.", error, _INTERRUPTED)
        except (ValueError, OSError, ImportError) as error:
            _stop(f"Error: {error}", error, _WRONG_INPUT)
        except (RuntimeError, MemoryError) as error:
            from torch import OutOfMemoryError

            from clext.data.idx import DataError
            from clext.training.loop import NonFiniteLossError

            known = DataError | NonFiniteLossError | OutOfMemoryError | MemoryError
            # Of the CPU's memory torch says it without a class.
            if not isinstance(error, known) and "can't allocate memory" not in str(error):
                raise
            code = _WRONG_INPUT if isinstance(error, DataError) else FAILED
            _stop(f"Error: {error}", error, code)


def _stop(message: str, error: BaseException, code: int) -> None:
    notes = getattr(error, "__notes__", [])
    line = next(iter(message.splitlines()), "")
    if len(line) > _LONGEST_LINE:  # it quotes what was given
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    ended = line if line.endswith((".", "!", "?")) or not notes else f"{line}."
    click.echo(" ".join([ended, *notes]), err=True)
    sys.exit(code)
