"""Checks of an optimizer's options that `torch.optim` also takes as tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clext.options import number


def flag(owner: str, option: str, value: object) -> bool:
    """`value` if it is a bool, else ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {option} must be True or False, got {value!r}")
    return value


def scalar(owner: str, option: str, value: object, **bounds: Any) -> float:  # noqa: ANN401
    """`value`, a number or a tensor of one, as a float within `bounds` (see `number`)."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return number(owner, option, value, **bounds)


def learning_rate(owner: str, value: object) -> float | Tensor:
    """`value` as a float >= 0; a tensor of one float stays, so that others can change it."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{owner}: lr must be a number or a float tensor of one element, got "
                f"{value.dtype} of shape {list(value.shape)}"
            )
        scalar(owner, "lr", value, minimum=0.0)
        return value
    return number(owner, "lr", value, minimum=0.0)


def refuse(owner: str, group: dict[str, Any], *options: str) -> None:
    """ValueError for options of torch's class that the fused step does not have."""
    for option in options:
        if flag(owner, option, group[option]):
            raise ValueError(
                f"{owner}: {option}=True is not supported by the fused step; use "
                f"torch.optim.{owner} with the method's add_penalty_grad_() and update()"
            )
