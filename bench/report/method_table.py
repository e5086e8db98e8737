"""The options of all methods and what each keeps, from clext itself."""

from __future__ import annotations

from clext.methods import METHODS
from clext.training.describe import bytes_after_a_task, option_values
from report.result_tables import markdown


def method_table() -> str:
    """A row for each method."""
    rows = []
    for name, kind in METHODS.items():
        options = " ".join(f"`{key}={value}`" for key, value in option_values(kind).items())
        kept = sum(bytes_after_a_task(kind).values()) / 1e6
        rows.append([f"`{name}`", options.replace("|", r"\|") or "none", f"{kept:.1f}"])
    return markdown(["method", "options", "kept, MB"], rows, left=2)
