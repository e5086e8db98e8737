"""What results of every kind have in common: a picture in a notebook, and a page."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clext.core.checks import as_path
from clext.training.storage import write_text
from clext.training.tables import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Section:
    """A section of a page: tables, words, what draws the pictures, settings, sections to unfold."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Sequence[Row]] = ()
    pictures: Sequence[Callable[[], Figure]] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    parts: Sequence[Section] = ()


class Outcome(ABC):
    """A result, a comparison or a sweep; `str` is its table."""

    @abstractmethod
    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw accuracy against epoch; save it at `path`."""

    @abstractmethod
    def section(self) -> Section:
        """What a page shows of it."""

    @property
    @abstractmethod
    def files(self) -> list[str]:
        """The names of the files that `save` writes beside the runs' own."""

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one page with tables, pictures and settings, which needs no other file."""
        return write_page(path, "Results", [self.section()])

    def _repr_png_(self) -> bytes | None:
        return _drawn(self.plot(), "png")

    def _repr_html_(self) -> str:
        """The table with the picture: a notebook shows this one if it can."""
        picture = self._repr_png_()
        source = f"data:image/png;base64,{b64encode(picture or b'').decode()}"
        image = f'<img width="720" src="{source}">' if picture else ""
        return f"<pre>{escape(str(self))}</pre>{image}"

    def __repr__(self) -> str:
        return str(self)


def settings_of(configs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The settings that are the same in all of these, in words; of a dict each entry."""
    first, *others = [_flat(config) for config in configs]
    return {
        name: value
        for name, value in first.items()
        if all(other.get(name) == value for other in others)
    }


def write_page(path: str | os.PathLike[str], title: str, sections: Sequence[Section]) -> Path:
    """Write a page of HTML at `path` that needs no other file; what it names cannot act in it."""
    from jinja2 import Environment, StrictUndefined

    file = as_path(path, "to_html: path")
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whoever wrote the results, their names are text.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["svg"] = _svg
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    write_text(file, page.render(title=title, sections=sections))
    return file


def _svg(figure: Figure) -> Any:  # noqa: ANN401
    """The figure as an element of HTML."""
    from markupsafe import Markup

    text = _drawn(figure, "svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Markup(text[text.index(b"<svg") :].decode())  # without the head of a file


def _drawn(figure: Figure, form: str, **options: Any) -> bytes:  # noqa: ANN401
    file = io.BytesIO()
    figure.savefig(file, format=form, **options)
    return file.getvalue()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    entries: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            entries |= _flat(value, f"{prefix}{name}.")
        else:
            entries[prefix + name] = str(value)
    return entries
