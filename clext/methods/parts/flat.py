"""The flat state: a method's state as tensors by name, as safetensors and torch's DCP keep it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# The entry with all that is no tensor: JSON, as bytes.
REST = "json"
# A checkpoint that is read into tensors of the same size must not mind a longer number.
_BLOCK = 4096


def flattened(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the parameters as "importance.<parameter>", everything else behind it."""
    rest = dict(state)
    flat = {
        f"{key}.{name}": entry.contiguous()
        for key, entries in rest.pop("state", {}).items()
        for name, entry in entries.items()
    }
    text = json.dumps(_encoded(rest, "", flat)).encode()
    text = text.ljust(-(-len(text) // _BLOCK) * _BLOCK)
    return {**flat, REST: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def nested(flat: Mapping[str, Tensor]) -> dict[str, Any]:
    """The state that `flattened` was given; ValueError if a part of it is missing."""
    left = dict(flat)
    if REST not in left:
        raise ValueError(
            f"the flat state has no {REST!r}; expected what flat_state_dict() returned"
        )
    state = _decoded(json.loads(bytes(left.pop(REST).tolist())), left)
    lists: dict[str, dict[str, Tensor]] = {}
    for path, entry in left.items():
        key, _, name = path.partition(".")
        lists.setdefault(key, {})[name] = entry
    return {**state, "state": lists} if lists else state


def _encoded(value: Any, path: str, flat: dict[str, Tensor]) -> Any:  # noqa: ANN401  (a tree)
    """As JSON, which has no tuples and no numbers as keys; tensors go to `flat`, by their path."""
    if isinstance(value, Tensor):
        flat[path] = value.contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        start = f"{path}." if path else ""
        pairs = [[key, _encoded(entry, f"{start}{key}", flat)] for key, entry in value.items()]
        return {"mapping": pairs}
    if isinstance(value, list | tuple):
        entries = [_encoded(entry, f"{path}.{i}", flat) for i, entry in enumerate(value)]
        return {"tuple": entries} if isinstance(value, tuple) else entries
    return value


def _decoded(value: Any, flat: dict[str, Tensor]) -> Any:  # noqa: ANN401
    """What `_encoded` was given; takes its tensors out of `flat`."""
    if isinstance(value, list):
        return [_decoded(entry, flat) for entry in value]
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: _decoded(entry, flat) for key, entry in value["mapping"]}
    if "tuple" in value:
        return tuple(_decoded(value["tuple"], flat))
    if value["tensor"] not in flat:
        raise ValueError(f"the flat state has no {value['tensor']!r}")
    return flat.pop(value["tensor"])
