"""The trainable tensors of a model by name, and a method's state for them in flat buffers."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clext.core.lists import PARAMETER_DTYPES, is_dense, state_dtype
from clext.core.sharding import check_meshes, local

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

T = TypeVar("T")

# A cache line, and more than the widest vector load of CPU or CUDA.
_ALIGNMENT_BYTES = 64


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that require a gradient, by name, in the order of the model.

    A tied parameter appears once, under its first name. Raises ValueError for a model without any,
    for parameters on several devices, and for parameters no state can be laid out for: not yet
    initialised, sparse, not dense in memory, or (TypeError) neither float nor half precision.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    named = {name: entry for name, entry in model.named_parameters() if entry.requires_grad}
    check_wrappers(model)
    check_parameters(named, type(model).__name__)
    return named


def check_wrappers(model: nn.Module) -> None:
    """ValueError for a model whose parameters are hidden in flat ones, or on no process whole."""
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    if any(isinstance(module, fsdp) for module in model.modules()):
        found = "FullyShardedDataParallel (FSDP1)"
    elif any(hasattr(entry, "ds_id") for entry in model.parameters()):
        found = "DeepSpeed ZeRO-3"
    else:
        return
    raise ValueError(
        f"clext does not see single parameters in {found}; shard the model with "
        "torch.distributed.fsdp.fully_shard (FSDP2), or use DistributedDataParallel"
    )


def device_of(model: nn.Module) -> torch.device:
    """Where the parameters of a model are."""
    return next(model.parameters()).device


# What wrappers put into the names of a model's parameters: torch.compile, DDP, FSDP, PEFT.
_ADAPTED = re.compile(r"(^|(?<=\.))(base_layer|original_module)\.")
_INSIDE = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|base_model\.model)\.")
_WRAPPED = re.compile(r"^(module\.)+")


def canonical_names(named: Mapping[str, T]) -> dict[str, T]:
    """The same by the names that they have without wrappers, where these are still distinct."""
    names = [_WRAPPED.sub("", _ADAPTED.sub("", _INSIDE.sub("", name))) for name in named]
    return dict(zip(names if len(set(names)) == len(names) else named, named.values(), strict=True))


def adapted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that an adapter of PEFT has frozen, and changes what they do, by canonical name."""
    adapted = {name: p for name, p in model.named_parameters() if _ADAPTED.search(name)}
    return canonical_names({name: p for name, p in adapted.items() if not p.requires_grad})


def check_parameters(
    named: Mapping[str, Tensor] | Sequence[tuple[str, Tensor]], owner: str
) -> None:
    """Raise unless `named` are dense float parameters of one device, at least one of them."""
    named = list(named.items() if isinstance(named, Mapping) else named)
    if not named:
        raise ValueError(
            f"{owner} has no trainable parameter: expected at least one with requires_grad=True"
        )
    check_meshes(owner, (entry for _, entry in named))
    first, device = next((name, entry.device) for name, entry in named)
    for name, parameter in named:
        entry = local(parameter)
        label = f"parameter '{name}' of {owner}"
        if is_lazy(entry):
            raise ValueError(
                f"{label} is not initialised yet: run one batch through the model first"
            )
        if entry.device.type == "meta":
            raise ValueError(f"{label} is on the meta device and holds no values")
        if entry.device != device:
            raise ValueError(
                f"{label} is on {entry.device}, but parameter '{first}' is on {device}: "
                "expected all trainable parameters on one device"
            )
        if entry.dtype not in PARAMETER_DTYPES:
            raise TypeError(
                f"{label} has dtype {entry.dtype}, expected float32, float64, bfloat16 or float16"
            )
        if entry.layout != torch.strided or not is_dense(entry):
            raise ValueError(
                f"{label} has layout {entry.layout} and strides "
                f"{list(entry.stride()) if entry.layout == torch.strided else None}, expected a "
                "dense tensor without overlap; make it contiguous()"
            )


def allocate_state(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Zeros shaped and laid out like each of `params`, on its device.

    In `dtype`, or else in the state dtype of each parameter. All tensors of one dtype are views of
    one flat buffer, each starting at a multiple of 64 bytes, so that a pass over the state runs
    through memory once.
    """
    views: list[Tensor | None] = [None] * len(params)
    dtypes = [dtype or state_dtype(entry.dtype) for entry in params]
    for kind in dict.fromkeys(dtypes):
        chosen = [i for i, other in enumerate(dtypes) if other == kind]
        step = _ALIGNMENT_BYTES // kind.itemsize
        offsets, total = [], 0
        for index in chosen:
            offsets.append(total)
            total += -(-params[index].numel() // step) * step
        buffer = torch.zeros(total, dtype=kind, device=params[chosen[0]].device)
        for index, offset in zip(chosen, offsets, strict=True):
            entry = params[index]
            views[index] = buffer.as_strided(entry.shape, entry.stride(), offset)
    return cast("list[Tensor]", views)


def memory_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The flat buffers that these tensors lie in."""
    buffers = {entry.untyped_storage().data_ptr(): entry for entry in tensors}
    return [
        torch.empty(0, dtype=entry.dtype, device=entry.device).set_(entry.untyped_storage())
        for entry in buffers.values()
    ]


def allocate_rows(parameter: Tensor, count: int) -> Tensor:
    """Zeros [count, *parameter.shape], each row laid out like the parameter, in its state dtype."""
    size = parameter.numel()
    flat = torch.zeros(count * size, dtype=state_dtype(parameter.dtype), device=parameter.device)
    return flat.as_strided((count, *parameter.shape), (size, *parameter.stride()))
