"""A run's settings in a file: YAML, of which JSON is a part, so that a `result.json` is one too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from clext.core.checks import unknown_name


def read_config(file: str, known: Iterable[str]) -> dict[str, Any]:
    """What a file says of a run, by the names of the command line's options, `known`.

    "options" are those of the method: `options: {gamma: 0.9}`. Raises OSError or ValueError in one
    sentence.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {file}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--config {file}: not a YAML file ({reason})") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"--config {file}: expected names and values, such as 'method: ewc', got "
            f"{type(content).__name__}"
        )
    if content.get("kind") == "result":
        content = _of_result(content.get("config", {}), set(known))
    settings = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name, value in settings.items():
        if name not in known:
            raise unknown_name(f"setting in {file}:", name, known)
        if isinstance(value, list | dict) and name not in ("log", "options"):
            raise ValueError(f"--config {file}: {name} must be one value, got {value!r}")
    options = settings.pop("options", None) or {}
    if not isinstance(options, Mapping):
        raise ValueError(f"--config {file}: options must be names and values, got {options!r}")
    return {**settings, "options": [f"{name}={value}" for name, value in options.items()]}


def _of_result(config: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The settings that a result records; what follows from them is left out."""
    for name in sorted({"loss", "transform", "batch_transform"} & config.keys()):
        if config[name] is not None and not (name in known and config[name] == "crop-flip"):
            raise ValueError(
                f"--config: the run had a {name} of its own ({config[name]}), which is a function; "
                "run it in Python"
            )
    settings = {name: value for name, value in config.items() if name in known}
    parts = str(config.get("method")).split("+")
    options: dict[str, Any] = {}
    for part in parts:
        own = config.get("method_options", {})
        own = own.get(part, {}) if len(parts) > 1 else own
        start = f"{part}." if len(parts) > 1 else ""
        # Its seed follows from that of the run.
        options |= {f"{start}{name}": value for name, value in own.items() if name != "seed"}
    if len(parts) > 1:  # among the options of the parts
        settings.pop("strength", None)
    model = str(settings.get("model"))
    if model.startswith("MLP "):
        settings["model"] = "-".join(["mlp", *model.removeprefix("MLP ").split("-")[1:-1]])
    settings.pop("device", None)  # it is described as the one that was found
    return {**settings, "options": options}
