"""Download a data set through torchvision, which is optional; a failure is a reason, no crash."""

from __future__ import annotations

import contextlib
import http.client
import io
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clext.core.console import has_terminal, say

# A machine without network may drop packets and never answer, and a name may resolve to many
# addresses that are tried in turn: so ask once, with a deadline on the whole attempt.
_PROBE_SECONDS = 5.0
_STALL_SECONDS = 20.0


def torchvision_problem() -> str | None:
    """Why torchvision cannot be used, or None if it can."""
    try:
        import torchvision.datasets  # noqa: F401
    except ModuleNotFoundError:
        return (
            "torchvision, which is needed to get it, is not installed (pip install 'clext[vision]')"
        )
    except Exception as error:  # beside another torch than its own it fails in many ways
        return f"torchvision, which is needed to get it, cannot be imported ({_first_line(error)})"
    return None


def download(
    class_name: str,
    root: Path,
    *,
    show: bool,
    parts: Sequence[dict[str, Any]] = ({"train": True}, {"train": False}),
) -> str | None:
    """Let the data set's class (see `dataset_class`) download to `root`; the reason if it did not.

    `parts` are what the class takes for each of its parts.
    """
    problem = torchvision_problem()
    if problem is not None:
        return problem
    from clext.data.image_folders import dataset_class

    source = dataset_class(class_name)
    if not _reachable(_servers(source)):
        return "the download servers cannot be reached from here"
    if show:
        say(f"clext: downloading {class_name} to {root}")
    try:
        with _stall_timeout(), _quiet(show):
            for part in parts:
                source(root, **part, download=True)
    except Exception as error:
        return f"the download to {root} failed ({_first_line(error)})"
    return None


def _servers(source: Any) -> list[str]:  # noqa: ANN401
    """Where such a class downloads from."""
    if hasattr(source, "split_list"):
        return [url for url, _, _ in source.split_list.values()]
    return [source.url] if hasattr(source, "url") else source.mirrors


def _reachable(urls: list[str]) -> bool:
    """True as soon as one of the servers answers anything, False when the time is over."""
    answered = threading.Event()

    def probe(url: str) -> None:
        request = urllib.request.Request(url, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # an answer all the same
        except (OSError, ValueError, http.client.HTTPException):
            return
        answered.set()

    threads = [threading.Thread(target=probe, args=(url,), daemon=True) for url in urls]
    for thread in threads:
        thread.start()
    pause = 0.05
    for _ in range(round(_PROBE_SECONDS / pause)):
        if answered.wait(pause) or not any(thread.is_alive() for thread in threads):
            break
    return answered.is_set()


@contextlib.contextmanager
def _stall_timeout() -> Iterator[None]:
    """Torchvision sets no timeout of its own: end a transfer on which nothing arrives."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet(show: bool) -> Iterator[None]:
    """Keep stdout clean, and stderr too unless progress is shown on a terminal."""
    sink: Any = io.StringIO()
    with contextlib.redirect_stdout(sink):
        if show and has_terminal():
            yield
        else:
            with contextlib.redirect_stderr(sink):
                yield


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
