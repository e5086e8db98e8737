"""Groups of processes that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Processes]]:
    """`processes(2)`: two processes, the same ones in every test, started when they are needed."""
    made = {ranks: Processes(ranks) for ranks in (2, 3, 4)}
    yield made.__getitem__
    for entry in made.values():
        entry.close()
