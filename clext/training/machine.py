"""The device of a run, and what else of the machine decides time and the last bits of a result."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch

from clext._version import __version__


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The given device if this machine has it; for None CUDA if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved).tolist()  # "meta" is a device, but holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(
            f"train: device {str(device)!r} is not available here ({reason}); "
            f"leave device out to use {resolve_device(None)}"
        ) from error
    return resolved


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions, as a result records them."""
    return {
        "device": str(device),
        "device_name": (
            torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        ),
        "threads": torch.get_num_threads(),
        "versions": {
            "clext": __version__,
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
    }
