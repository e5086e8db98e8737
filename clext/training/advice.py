"""What a run says of itself that whoever started it may not know."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch

from clext.training.chance import class_shares

if TYPE_CHECKING:
    from torch import Tensor

    from clext.methods import Method
    from clext.training.settings import Settings

_NEAR = 0.1  # of the way from chance to a perfect task


def warn_of_slow_precision(precision: str, device: torch.device) -> None:
    """Say so if the device has no arithmetic in bfloat16, which is then made of float32's."""
    if precision == "bf16" and device.type == "cpu" and not _multiplies_bf16():
        warnings.warn(
            "clext: this CPU has no bf16 arithmetic, so precision='bf16' is slower here than "
            "'fp32'",
            stacklevel=4,  # where `train` was called
        )


def _multiplies_bf16() -> bool:
    there = torch.cpu.get_capabilities()
    return any(there.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def warn_if_near_chance(
    method: Method, settings: Settings, task: int, accuracy: float, labels: Tensor
) -> None:
    """Say so if a task, counted from 0, ended hardly better than its most frequent class alone."""
    chance = float(class_shares(labels).max())
    if accuracy >= chance + _NEAR * (1 - chance):
        return
    remedy = f"try another lr (now {settings.lr:g}) or more epochs (now {settings.epochs})"
    if task > 0 and method.has_strength:
        remedy += f", or a smaller strength (now {method.strength:g})"
    warnings.warn(
        f"{method.name}: task {task + 1} ended near chance, with accuracy {accuracy:.2f}, where "
        f"its most frequent class alone gives {chance:.2f}; {remedy}",
        stacklevel=7,  # where `train` was called
    )
