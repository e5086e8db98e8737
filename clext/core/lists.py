"""What every op asks of its lists of tensors: state dtype, dense layout, entries that match.

The same rules and messages as csrc/check.cpp, for the ops in plain torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TensorList = Sequence[Tensor]

PARAMETER_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of importance, anchor and path of a parameter: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def widest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Dtype of a reduction over all `tensors`: float64 if any of them is float64, else float32."""
    wide = any(entry.dtype == torch.float64 for entry in tensors)
    return torch.float64 if wide else torch.float32


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a strided tensor fill one block of memory, each exactly once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue  # the stride of a dimension of one element is never used
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def same_layout(sizes: Sequence[int], strides: Sequence[int], expected: Sequence[int]) -> bool:
    """Whether an index means the same place in memory with either strides."""
    return all(
        size <= 1 or stride == other
        for size, stride, other in zip(sizes, strides, expected, strict=True)
    )


@dataclass(frozen=True)
class Argument:
    """One list argument of an op, as its schema names it.

    `state`: entries have the state dtype, not the parameter's own. `rows`: entries have one more
    dimension in front. `written`: changed in place, so that a copy in another layout will not do.
    `scalar`: entries are 0-dim.
    """

    name: str
    tensors: TensorList
    state: bool = False
    written: bool = False
    rows: bool = False
    scalar: bool = False


def state(name: str, tensors: TensorList, *, written: bool = False) -> Argument:
    """A list argument of state tensors."""
    return Argument(name, tensors, state=True, written=written)


def check_lists(
    op: str, layout: Argument, *others: Argument, parameter_names: Sequence[str] = ()
) -> None:
    """Raise unless entry i of every list fits entry i of `layout`, which gives shape and strides.

    ValueError, or TypeError for dtypes and sparse tensors; `parameter_names` make messages say
    which parameter is meant.
    """
    arguments = (layout, *others)
    for argument in others:
        if len(argument.tensors) != len(layout.tensors):
            raise ValueError(
                f"{op}: {argument.name} has {len(argument.tensors)} tensors, expected "
                f"{len(layout.tensors)} (as many as {layout.name})"
            )
    leading = next((argument for argument in arguments if not argument.state), layout)
    for index, like in enumerate(layout.tensors):
        suffix = f" of parameter '{parameter_names[index]}'" if parameter_names else ""
        labels = [f"{op}: {argument.name}[{index}]{suffix}" for argument in arguments]
        dtype = _leading_dtype(op, leading, index, suffix)
        for argument, label in zip(arguments, labels, strict=True):
            _check_entry(label, argument, index, like, dtype, layout.tensors[0].device)
        if not is_dense(like):
            raise ValueError(
                f"{labels[0]} of shape {list(like.shape)} has strides {list(like.stride())}, "
                "expected a dense tensor without overlap; make it contiguous()"
            )
        for argument, label in zip(others, labels[1:], strict=True):
            entry = argument.tensors[index]
            laid_out = argument.written and not argument.scalar
            if laid_out and not same_layout(like.shape, entry.stride(), like.stride()):
                raise ValueError(
                    f"{label} has strides {list(entry.stride())}, expected {list(like.stride())} "
                    f"({layout.name}[{index}]); it is written in place, so create it with "
                    "torch.empty_like"
                )
    _check_overlap(op, arguments)


def check_scalar(op: str, name: str, value: float, *, positive: bool = False) -> None:
    """Raise ValueError unless `value` is finite and not below (if `positive`, above) zero."""
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        bound = "> 0" if positive else ">= 0"
        raise ValueError(f"{op}: {name} is {value}, expected a finite number {bound}")


def check_fraction(op: str, name: str, value: float) -> None:
    """Raise ValueError unless `value` lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{op}: {name} is {value}, expected a number in [0, 1]")


def _leading_dtype(op: str, leading: Argument, index: int, suffix: str) -> torch.dtype:
    dtype = leading.tensors[index].dtype
    known = dtype in PARAMETER_DTYPES and not (leading.state and dtype != state_dtype(dtype))
    if not known:
        expected = (
            "float32 or float64" if leading.state else "float32, float64, bfloat16 or float16"
        )
        raise TypeError(
            f"{op}: {leading.name}[{index}]{suffix} has dtype {dtype}, expected {expected}"
        )
    return dtype


def _check_entry(
    label: str,
    argument: Argument,
    index: int,
    like: Tensor,
    leading: torch.dtype,
    device: torch.device,
) -> None:
    entry = argument.tensors[index]
    if entry.layout != torch.strided:
        raise TypeError(
            f"{label} has layout {entry.layout}, expected a dense (strided) tensor; "
            "build layers such as Embedding with sparse=False"
        )
    # Torch refuses to count the change of such a tensor, but only after it has been made.
    if argument.written and entry.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{label} was made in torch.inference_mode(), expected a normal tensor since it is "
            "written outside of it; clone() it here"
        )
    if entry.device != device:
        raise ValueError(
            f"{label} is on {entry.device}, expected {device} "
            "(all tensors of one call share a device)"
        )
    dtype = state_dtype(leading) if argument.state else leading
    if entry.dtype != dtype:
        why = " (state is float64 for float64 parameters, else float32)" if argument.state else ""
        raise TypeError(f"{label} has dtype {entry.dtype}, expected {dtype}{why}")
    if argument.scalar:
        if entry.dim() != 0:
            raise ValueError(f"{label} has shape {list(entry.shape)}, expected a 0-dim tensor")
        return
    shape = entry.shape[1:] if argument.rows else entry.shape
    if shape != like.shape or entry.dim() != like.dim() + argument.rows:
        expected = f"{'one row per output of shape ' if argument.rows else ''}{list(like.shape)}"
        raise ValueError(f"{label} has shape {list(entry.shape)}, expected {expected}")


def _check_overlap(op: str, arguments: Sequence[Argument]) -> None:
    """A written tensor must share memory with no other: a copy would follow the live one."""
    extents = []
    for argument in arguments:
        for index, entry in enumerate(argument.tensors):
            if entry.numel() > 0 and entry.device.type != "meta":
                span = 1 + sum(
                    (size - 1) * stride
                    for size, stride in zip(entry.shape, entry.stride(), strict=True)
                )
                begin = entry.data_ptr()
                label = f"{argument.name}[{index}]"
                extents.append(
                    (begin, begin + span * entry.element_size(), argument.written, label)
                )
    extents.sort(key=lambda extent: extent[0])
    end, written_end, label, written_label = 0, 0, "", ""
    for begin, stop, written, name in extents:
        other_end, other = (end, label) if written else (written_end, written_label)
        if other_end > begin:
            raise ValueError(
                f"{op}: {name} shares memory with {other}; one of them is written in place, "
                "so give it memory of its own (clone)"
            )
        if stop > end:
            end, label = stop, name
        if written and stop > written_end:
            written_end, written_label = stop, name
