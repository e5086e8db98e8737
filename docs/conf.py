"""How Sphinx builds the pages: `pip install ".[docs]" && sphinx-build -W docs docs/_build`."""

from __future__ import annotations

import re
from typing import Any

project = "clext"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "pydata_sphinx_theme"
html_theme_options = {"show_prev_next": False, "navigation_with_keys": False}
html_title = "clext"
smartquotes = False
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "code"  # single backticks in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
napoleon_use_rtype = False


def as_written(*arguments: Any) -> None:  # noqa: ANN401
    """Docstrings are plain text: outside of backticks nothing is markup."""
    lines = arguments[-1]
    for number, line in enumerate(lines):
        parts = re.split(r"(`[^`]*`)", line)
        parts[::2] = [re.sub(r"([*|]|_(?=\W|$))", r"\\\1", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def setup(app: Any) -> None:  # noqa: ANN401
    """Before napoleon, which makes markup of the sections."""
    app.connect("autodoc-process-docstring", as_written, priority=400)
