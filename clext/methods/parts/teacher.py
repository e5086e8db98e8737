"""A model as it was at one time: what distillation and generated replay learn from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clext.core.modes import module_mode

# Large enough that a batch keeps every core busy, small enough for any model's activations.
LARGE_BATCH = 1000


class Snapshot:
    """Copies of a model's parameters and buffers, and the model run with them.

    It is the live model that runs, so its hooks apply, and with them the selection of outputs (see
    `Outputs`). The model may have grown since: parameters that came later are the live ones, and a
    head that was replaced by a wider one of the same name has its old width.

    Args:
        model: whose values are copied, on the device where they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._values = {
            name: value.detach().clone(memory_format=torch.preserve_format)
            for name, value in _named_values(model).items()
        }

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """What the model returned for `inputs` at that time, in eval mode and without gradients.

        Raises:
            RuntimeError: the live model has lost a parameter or buffer since.
        """
        lost = self._values.keys() - _named_values(self._model).keys()
        if lost:
            raise RuntimeError(
                f"the model as it was has '{min(lost)}', which the model has no more; keep the "
                "names of what it is made of, and add what is new under other names"
            )
        with module_mode(self._model, training=False):
            outputs: Tensor = functional_call(self._model, self._values, (inputs,))
        return outputs

    def record(self, inputs: Tensor) -> Tensor:
        """The same for many inputs, in batches of 1000."""
        return torch.cat([self(batch) for batch in inputs.split(LARGE_BATCH)])

    def move(self, device: torch.device) -> None:
        """Move the copies to `device`."""
        self._values = {name: value.to(device) for name, value in self._values.items()}

    def state_dict(self) -> dict[str, Any]:
        """The values by name, as copies, and the names, by which a loss of values is seen."""
        values = {name: value.clone() for name, value in self._values.items()}
        return {"names": list(values), "values": values}

    @classmethod
    def load(cls, owner: str, model: nn.Module, given: object) -> Snapshot:
        """The snapshot of `model` that `state_dict` was made of, on the model's device.

        Raises:
            ValueError: `given`, called `owner` in the message, is no such state of this model.
        """
        values = _checked_values(owner, model, given)
        snapshot = cls.__new__(cls)
        snapshot._model, snapshot._values = model, values
        return snapshot


def refuse_broken(owner: str, model: nn.Module, what: str = "model") -> None:
    """ValueError if a model, `what` in the message, is no teacher: training has broken it.

    A buffer may hold -inf, of which masks are made.
    """
    entries: list[tuple[str, str, Tensor]] = [
        ("parameter", name, value) for name, value in model.named_parameters()
    ]
    entries += [("buffer", name, value) for name, value in model.named_buffers()]
    for kind, name, value in entries:
        if not _usable(value.detach(), mask=kind == "buffer"):
            raise ValueError(
                f"{owner}: the {what}'s {kind} {name!r} holds NaN or infinity, so the {what} is "
                "of no use to later tasks: go back to state dicts of the model and the method "
                "saved before it"
            )


def _usable(value: Tensor, *, mask: bool) -> bool:
    """Whether all numbers are finite, or with `mask` also -inf."""
    usable = value.isfinite()
    if mask and value.is_floating_point():
        usable = usable | value.isneginf()
    return bool(usable.all())


def _named_values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; what is shared goes by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _checked_values(owner: str, model: nn.Module, given: object) -> dict[str, Tensor]:
    """`given` as copies on the model's device, in its types; ValueError if they do not fit it."""
    if not isinstance(given, dict) or given.keys() != {"names", "values"}:
        got = ", ".join(map(str, given)) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{owner} holds {got or 'nothing'}, expected names and values")
    names, values = given["names"], given["values"]
    if not isinstance(names, list) or not isinstance(values, dict):
        raise ValueError(
            f"{owner} has names and values of {type(names).__name__} and {type(values).__name__}, "
            "expected a list, and a dict of tensors by name"
        )
    live = _named_values(model)
    unknown = sorted(values.keys() - live.keys(), key=str)
    if unknown or not values:
        what = f"'{unknown[0]}', which the model has not" if unknown else "nothing"
        raise ValueError(f"{owner} holds {what}; expected the model's parameters and buffers")
    # A model that has grown since has more than the state; what the state had it has to have still.
    if sorted(names, key=str) != sorted(values, key=str):
        missing = [name for name in names if name not in values]
        what = f"'{missing[0]}' is missing" if missing else "there are others"
        raise ValueError(f"{owner}: {what} among its values, expected those that its names list")
    return {
        name: _checked_value(f"{owner}[{name!r}]", live[name], value)
        for name, value in values.items()
    }


def _checked_value(label: str, live: Tensor, given: object) -> Tensor:
    if not isinstance(given, Tensor) or given.layout != torch.strided or given.is_meta:
        raise ValueError(f"{label} is {type(given).__name__}, expected a dense tensor with values")
    fits = given.dim() == live.dim() and all(
        old <= new for old, new in zip(given.shape, live.shape, strict=True)
    )
    if not fits or given.is_floating_point() != live.is_floating_point():
        raise ValueError(
            f"{label} is {given.dtype} {list(given.shape)}, expected the {live.dtype} "
            f"{list(live.shape)} of the model, or no larger"
        )
    if not _usable(given.detach(), mask=not isinstance(live, nn.Parameter)):
        raise ValueError(f"{label} holds NaN or infinity")
    return given.detach().to(live.device, live.dtype, copy=True)
