"""No protection at all: what forgetting looks like."""

from __future__ import annotations

from typing import ClassVar

from clext.methods.base import Method


class Baseline(Method):
    """Plain training."""

    name: ClassVar[str] = "baseline"
