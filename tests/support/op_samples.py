"""Sample inputs of every op, and comparisons of its results: what all tests of the ops share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from op_arguments import ROWS, Arguments, Counts, ListArg, Op, TensorArg, Unused
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 32 * 1024  # kCpuChunkSize: one partial sum each
# Around a vector, a lane, a block of the reduction and a chunk.
SIZES = (0, 1, 2, 15, 16, 17, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)


# ----------------------------------------------------------------------------- sample inputs


@dataclass(frozen=True)
class Entry:
    """What entry i of every list of a call looks like; `dtype` is the parameter's.

    `layout`: contiguous, transposed, channels_last (4 dimensions), or unaligned (contiguous, from
    the second element of a larger block of memory on). `compact`: anchors and importances are
    bfloat16 instead of float32.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    compact: bool = False

    def dtype_of(self, kind: str) -> torch.dtype:
        """Of the entry of a list of this kind."""
        if kind == "parameter":
            return self.dtype
        is_compact = self.compact and kind == "consolidated" and self.dtype != torch.float64
        return torch.bfloat16 if is_compact else state_dtype(self.dtype)


# Every kind of tensor that a call may mix; the empty one and the scalar among them.
ASSORTMENT = (
    Entry((5, 3)),
    Entry((), torch.bfloat16),
    Entry((1000,), torch.float64),
    Entry((4, 6), torch.float16, "transposed"),
    Entry((0, 4)),
    Entry((2, 3, 4, 5), torch.bfloat16, "channels_last"),
    Entry((1031,), torch.bfloat16, "unaligned"),
    Entry((1,), torch.float64),
    Entry((CHUNK + 5,)),
    Entry((3, 4, 5), torch.float64, "transposed"),
    Entry((CHUNK + 7,), compact=True),
    Entry((4, 9), torch.bfloat16, "transposed", compact=True),
    Entry((1033,), torch.float16, "unaligned", compact=True),
    Entry((), compact=True),
)


def assortment(op: Op) -> tuple[Entry, ...]:
    if op.mixed_dtypes:
        return ASSORTMENT
    return tuple(entry for entry in ASSORTMENT if entry.dtype != torch.float64)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def strides_of(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    empty = torch.empty(shape, device="meta")
    if layout == "transposed":
        order = tuple(reversed(range(len(shape))))
        return empty.permute(order).contiguous().permute(order).stride()
    if layout == "channels_last":
        return empty.contiguous(memory_format=torch.channels_last).stride()
    return empty.stride()


def lay_out(values: Tensor, layout: str, rows: bool = False) -> Tensor:
    """A copy of `values`; with `rows` the layout is that of each row."""
    shape = tuple(values.shape[1:] if rows else values.shape)
    strides = strides_of(shape, layout)
    if rows:
        strides = (max(values[0].numel(), 1), *strides)
    offset = 1 if layout == "unaligned" else 0
    memory = torch.empty(values.numel() + offset, dtype=values.dtype, device=values.device)
    return memory.as_strided(values.shape, strides, offset).copy_(values)


def sample(op: Op, entries: tuple[Entry, ...], device: str = "cpu", seed: int = 0) -> Arguments:
    """Valid arguments of `op`: normal random numbers, the same on each device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def tensor(arg: ListArg, entry: Entry) -> Tensor:
        rows = arg.kind == "rows"
        values = normal((ROWS, *entry.shape) if rows else entry.shape)
        values = (values.relu() if arg.nonnegative else values).to(entry.dtype_of(arg.kind))
        return lay_out(values.to(device), entry.layout, rows)

    arguments: Arguments = {}
    for arg in op.args:
        if isinstance(arg, ListArg):
            arguments[arg.name] = [tensor(arg, entry) for entry in entries]
        elif isinstance(arg, Unused):
            arguments[arg.name] = []
        elif isinstance(arg, Counts):
            dtypes = [state_dtype(entry.dtype) for entry in entries]
            numbers = torch.randint(5, (len(entries),), generator=generator)
            arguments[arg.name] = [
                number.to(device, dtype) for number, dtype in zip(numbers, dtypes, strict=True)
            ]
        elif isinstance(arg, TensorArg):
            wide = any(entry.dtype == torch.float64 for entry in entries)
            dtype = torch.float64 if wide else torch.float32
            values = normal(arg.shape) if arg.value is None else torch.full(arg.shape, arg.value)
            arguments[arg.name] = values.to(device, arg.dtype or dtype)
        else:
            arguments[arg.name] = arg.value
    return arguments


def copy(arguments: Arguments, dtype: torch.dtype | None = None) -> Arguments:
    """Clones with the same strides, as `dtype` if one is given."""

    def clone(value: Any) -> Any:
        if isinstance(value, list):
            return [clone(entry) for entry in value]
        if not isinstance(value, Tensor):
            return value
        return value.detach().to(dtype or value.dtype, copy=True)

    return {name: clone(value) for name, value in arguments.items()}


# ----------------------------------------------------------------------------- comparisons


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    """Every tensor of the arguments by its name in messages, such as anchors[3]."""
    named = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            named[name] = value
        elif isinstance(value, list):
            named |= {f"{name}[{i}]": entry for i, entry in enumerate(value)}
    return named


def outputs_of(op: Op, arguments: Arguments, returned: Any) -> dict[str, Tensor]:
    """All that a call has produced: its written lists and what it returned."""
    written = {name: arguments[name] for name in op.written}
    return tensors_of({**written, "returns": returned})


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, in the order of its indices."""
    # A copy: one element counts as contiguous whatever its stride, and view() minds that.
    copied = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return copied.flatten().view(torch.uint8)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert torch.equal(bits(tensor), bits(expected[name])), f"{name} differs"


def check_against_reference(op: Op, arguments: Arguments) -> dict[str, Tensor]:
    """Runs the kernel on `arguments` and the oracle on the same numbers in float64."""
    before, exact = copy(arguments), copy(arguments, torch.float64)
    actual = outputs_of(op, arguments, op.kernel(arguments))
    expected = outputs_of(op, exact, op.reference(exact))
    assert actual.keys() == expected.keys()
    dtypes = {tensor.dtype for tensor in arguments[op.layout]}
    half = [entry.dtype for entry in arguments[op.layout] if entry.element_size() == 2]
    coupled = {"importances"} if op.couples_tensors else {"returns"} & actual.keys()
    for name in {key.split("[")[0] for key in actual}:
        for dtype in {tensor.dtype for key, tensor in actual.items() if key.startswith(name)}:
            keys = [key for key in actual if key.startswith(name) and actual[key].dtype == dtype]
            coarse = name in coupled and dtypes != {torch.float64}
            assert_close_to_exact(
                name,
                torch.cat([actual[key].flatten() for key in keys]),
                torch.cat([expected[key].flatten() for key in keys]),
                torch.float32 if coarse else state_dtype(dtype),
                is_sum=name in actual,
                # The movement of a parameter is that of what is stored, but exact is not rounded.
                slack=_rounding(half, before["grads"], exact["params"])
                if name == "path" and "params" in op.written
                else _cancelled(
                    expected[name], state_dtype(max(dtypes, key=lambda d: torch.finfo(d).eps))
                )
                if name in actual and op.returns and dtypes
                else 0.0,
            )
    if (value := actual.get("returns")) is not None:
        assert value.shape == (op.returns if arguments[op.layout] else (1,) * len(op.returns))
        wide = op.returns_double or torch.float64 in dtypes
        assert value.dtype == (torch.float64 if wide else torch.float32)
    read = {arg.name for arg in op.args} - set(op.written)
    assert_same_bits(
        tensors_of({name: arguments[name] for name in read}),
        tensors_of({name: before[name] for name in read}),
    )
    return actual


def _cancelled(products: Tensor, dtype: torch.dtype) -> float:
    """Rounding of products of both signs: an entry of the matrix is as exact as its largest one."""
    finite = products[products.isfinite()].abs()
    return 32 * torch.finfo(dtype).eps * max([0.0, *finite.flatten().tolist()])


def _rounding(half: list[torch.dtype], grads: list[Tensor], params: list[Tensor]) -> float:
    """The largest gradient times the largest rounding of a parameter to one of these dtypes."""

    def largest(tensors: list[Tensor]) -> float:
        flat = torch.cat([entry.double().flatten() for entry in tensors]).abs()
        return max([0.0, *flat[flat.isfinite()].tolist()])

    return (
        max([0.0, *(torch.finfo(dtype).eps for dtype in half)]) * largest(grads) * largest(params)
    )


def assert_close_to_exact(
    name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype, is_sum: bool, slack: float = 0.0
) -> None:
    """`dtype` is the one that the arithmetic was done in.

    A few roundings of the largest number in play, since differences cancel; a reduction adds up to
    64 numbers in a row in float32 before it goes on in float64; and the result is rounded once.
    `slack`: absolute, for what is not arithmetic.
    """
    eps = torch.finfo(dtype).eps
    exact = exact.double()
    finite = exact[exact.isfinite()].abs()
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    rtol = torch.finfo(actual.dtype).eps / 2 + (32 * eps if is_sum else 4 * eps)
    # Below the smallest normal number the spacing, and with it the last rounding, is constant.
    output = torch.finfo(actual.dtype)
    atol = output.smallest_normal * output.eps + (0.0 if is_sum else 8 * eps * largest) + slack
    torch.testing.assert_close(
        actual.double(), exact, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
