"""No protection at all: what forgetting looks like."""

from __future__ import annotations

from typing import ClassVar

from clext.methods.unpenalised import Unpenalised


class Baseline(Unpenalised):
    """Plain training."""

    name: ClassVar[str] = "baseline"
