"""One registry of every op, with the sample inputs that all tests of the ops share.

A new op is one entry of `OPS`: the tests of its values, layouts, bits, gradients, errors and schema
follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clext import ops, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CHUNK = 32 * 1024  # kCpuChunkSize: one partial sum each
# Around a vector, a lane, a block of the reduction and a chunk.
SIZES = (0, 1, 2, 15, 16, 17, 1023, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3)
ROWS, SLICES = 3, 5

Arguments = dict[str, Any]  # in schema order: lists of tensors, tensors and numbers


@dataclass(frozen=True)
class ListArg:
    """A list of tensors. `kind`: parameter, state or rows. `access`: read, update or write."""

    name: str
    kind: str
    access: str = "read"
    nonnegative: bool = False

    @property
    def written(self) -> bool:
        return self.access != "read"


@dataclass(frozen=True)
class TensorArg:
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Scalar:
    name: str
    value: float
    invalid: tuple[float, ...]


def params() -> ListArg:
    return ListArg("params", "parameter")


def grads(access: str = "read") -> ListArg:
    return ListArg("grads", "parameter", access)


def state(name: str, access: str = "read") -> ListArg:
    """State of any sign."""
    return ListArg(name, "state", access)


def weights(name: str, access: str = "read") -> ListArg:
    """State that is never negative, and 0 for half of the elements."""
    return ListArg(name, "state", access, nonnegative=True)


NAN, INF = float("nan"), float("inf")


def at_least_zero(name: str, value: float) -> Scalar:
    return Scalar(name, value, (-1.0, -1e-9, NAN, INF, -INF))


def above_zero(name: str, value: float) -> Scalar:
    return Scalar(name, value, (0.0, -1.0, NAN, INF))


def fraction(name: str, value: float) -> Scalar:
    return Scalar(name, value, (-0.1, 1.0000001, NAN, INF))


@dataclass(frozen=True)
class Example:
    """Numbers worked out by hand: inputs, and what the written lists and "returns" become."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]


@dataclass(frozen=True)
class Op:
    name: str
    args: tuple[ListArg | TensorArg | Scalar, ...]
    examples: tuple[Example, ...]
    layout: str = "params"  # the list that gives shapes and strides
    mixed_dtypes: bool = True  # float32 and float64 parameters in one call
    couples_tensors: bool = False  # an element of importances depends on all tensors of the call

    @property
    def lists(self) -> list[ListArg]:
        return [arg for arg in self.args if isinstance(arg, ListArg)]

    @property
    def scalars(self) -> list[Scalar]:
        return [arg for arg in self.args if isinstance(arg, Scalar)]

    def kernel(self, arguments: Arguments) -> Any:
        return getattr(ops, self.name)(*arguments.values())

    def reference(self, arguments: Arguments) -> Any:
        return getattr(reference, self.name)(*arguments.values())

    def __str__(self) -> str:
        return self.name


_STEP = {"params": 2.5, "previous": 2.0, "grads": 3.0, "anchors": 1.0, "importances": 0.5}

OPS = (
    Op(
        "quadratic_penalty",
        (params(), state("anchors"), weights("importances")),
        (Example({"params": 3.0, "anchors": 1.0, "importances": 0.5}, {"returns": 2.0}),),
    ),
    Op(
        "quadratic_penalty_backward",
        (TensorArg("grad", ()), params(), state("anchors"), weights("importances")),
        (
            Example(
                {"grad": 3.0, "params": 3.0, "anchors": 1.0, "importances": 0.5}, {"returns": 6.0}
            ),
        ),
    ),
    Op(
        "add_quadratic_penalty_grad_",
        (
            grads("update"),
            params(),
            state("anchors"),
            weights("importances"),
            at_least_zero("strength", 0.75),
        ),
        (
            Example(
                {"grads": 10.0, "params": 3.0, "anchors": 1.0, "importances": 0.5, "strength": 0.25},
                {"grads": 10.5, "returns": 0.5},
            ),
        ),
    ),
    Op(
        "accumulate_path_integral_",
        (
            state("path", "update"),
            state("previous", "update"),
            params(),
            grads(),
            state("anchors"),
            weights("importances"),
            at_least_zero("strength", 0.75),
        ),
        (Example({"path": 1.0, **_STEP, "strength": 0.25}, {"path": -0.375, "previous": 2.5}),),
    ),
    Op(
        "riemannian_walk_step_",
        (
            state("path", "update"),
            state("previous", "update"),
            weights("fisher", "update"),
            params(),
            grads(),
            state("anchors"),
            weights("importances"),
            at_least_zero("strength", 0.75),
            fraction("decay", 0.9),
        ),
        (
            Example(
                {"path": 1.0, "fisher": 8.0, **_STEP, "strength": 0.25, "decay": 0.75},
                {"path": -0.375, "previous": 2.5, "fisher": 7.890625},
            ),
        ),
    ),
    Op(
        "accumulate_riemannian_walk_score_",
        (
            weights("task_score", "update"),
            state("path", "update"),
            state("interval_start", "update"),
            weights("fisher"),
            params(),
            above_zero("eps", 0.125),
        ),
        (
            Example(
                {
                    "task_score": [1.0, 1.0],
                    "path": [6.0, -6.0],
                    "interval_start": [1.0, 1.0],
                    "fisher": [4.0, 4.0],
                    "params": [2.0, 2.0],
                    "eps": 1.0,
                },
                {"task_score": [3.0, 1.0], "path": [0.0, 0.0], "interval_start": [2.0, 2.0]},
            ),
        ),
    ),
    Op(
        "accumulate_square_",
        (weights("acc", "update"), grads(), at_least_zero("scale", 0.75)),
        (Example({"acc": 1.0, "grads": -3.0, "scale": 0.5}, {"acc": 5.5}),),
        layout="acc",
    ),
    Op(
        "accumulate_abs_",
        (weights("acc", "update"), grads(), at_least_zero("scale", 0.75)),
        (Example({"acc": [1.0, 1.0], "grads": [-3.0, 2.0], "scale": 0.5}, {"acc": [2.5, 2.0]}),),
        layout="acc",
    ),
    Op(
        "sliced_importance_",
        (
            weights("acc", "update"),
            ListArg("jacobian", "rows"),
            TensorArg("slices", (SLICES, ROWS)),
            at_least_zero("scale", 0.75),
        ),
        (
            Example(
                {
                    "acc": [1.0],
                    "jacobian": [[2.0], [3.0]],
                    "slices": [[1.0, 0.0], [1.0, -1.0]],
                    "scale": 0.5,
                },
                {"acc": [3.5]},
            ),
        ),
        layout="acc",
        mixed_dtypes=False,
    ),
    Op(
        "consolidate_importance_",
        (
            weights("importances", "update"),
            state("anchors", "write"),
            weights("estimate"),
            params(),
            fraction("gamma", 0.75),
        ),
        (
            Example(
                {"importances": 2.0, "anchors": 9.0, "estimate": 3.0, "params": 5.0, "gamma": 0.5},
                {"importances": 4.0, "anchors": 5.0},
            ),
        ),
    ),
    Op(
        "consolidate_all_anchors_",
        (
            weights("importances", "update"),
            state("anchors", "update"),
            weights("estimate"),
            params(),
            fraction("gamma", 0.75),
        ),
        (
            Example(
                {
                    "importances": [2.0, 0.0],
                    "anchors": [1.0, 1.0],
                    "estimate": [3.0, 0.0],
                    "params": [5.0, 5.0],
                    "gamma": 0.5,
                },
                {"importances": [4.0, 0.0], "anchors": [4.0, 5.0], "returns": 12.0},
            ),
        ),
    ),
    Op(
        "consolidate_path_integral_",
        (
            weights("importances", "update"),
            state("anchors", "update"),
            state("path", "update"),
            params(),
            above_zero("xi", 0.125),
        ),
        (
            Example(
                {
                    "importances": [1.0, 1.0],
                    "anchors": [2.0, 2.0],
                    "path": [3.0, -3.0],
                    "params": [3.0, 3.0],
                    "xi": 0.5,
                },
                {"importances": [3.0, 1.0], "anchors": [3.0, 3.0], "path": [0.0, 0.0]},
            ),
        ),
    ),
    Op(
        "consolidate_riemannian_walk_",
        (
            weights("importances", "write"),
            state("anchors", "write"),
            weights("score", "update"),
            weights("task_score", "update"),
            weights("fisher"),
            params(),
            fraction("mix", 0.25),
        ),
        (
            Example(
                {
                    "importances": [9.0, 9.0],
                    "anchors": [9.0, 9.0],
                    "score": [2.0, 0.0],
                    "task_score": [6.0, 2.0],
                    "fisher": [4.0, 1.0],
                    "params": [7.0, 8.0],
                    "mix": 0.5,
                },
                {
                    "importances": [2.0, 0.5],
                    "anchors": [7.0, 8.0],
                    "score": [4.0, 1.0],
                    "task_score": [0.0, 0.0],
                },
            ),
            # Nothing learned: no importance, rather than 0 / 0.
            Example(
                {
                    "importances": 9.0,
                    "anchors": 9.0,
                    "score": 0.0,
                    "task_score": 0.0,
                    "fisher": 0.0,
                    "params": 7.0,
                    "mix": 0.5,
                },
                {"importances": 0.0, "anchors": 7.0, "score": 0.0, "task_score": 0.0},
            ),
        ),
        couples_tensors=True,
    ),
)


# ----------------------------------------------------------------------------- sample inputs


@dataclass(frozen=True)
class Entry:
    """What entry i of every list of a call looks like; `dtype` is the parameter's.

    `layout`: contiguous, transposed, channels_last (4 dimensions), or unaligned (contiguous, from
    the second element of a larger block of memory on).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"


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
        dtype = entry.dtype if arg.kind == "parameter" else state_dtype(entry.dtype)
        values = (values.relu() if arg.nonnegative else values).to(dtype)
        return lay_out(values.to(device), entry.layout, rows)

    arguments: Arguments = {}
    for arg in op.args:
        if isinstance(arg, ListArg):
            arguments[arg.name] = [tensor(arg, entry) for entry in entries]
        elif isinstance(arg, TensorArg):
            wide = any(entry.dtype == torch.float64 for entry in entries)
            dtype = torch.float64 if wide else torch.float32
            arguments[arg.name] = normal(arg.shape).to(device, dtype)
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
    written = {arg.name: arguments[arg.name] for arg in op.lists if arg.written}
    return tensors_of({**written, "returns": returned})


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor's elements, in the order of its indices."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


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
    couples = {"returns"} | ({"importances"} if op.couples_tensors else set())
    for name in {key.split("[")[0] for key in actual}:
        for dtype in {tensor.dtype for key, tensor in actual.items() if key.startswith(name)}:
            keys = [key for key in actual if key.startswith(name) and actual[key].dtype == dtype]
            coarse = name in couples and dtypes != {torch.float64}
            assert_close_to_exact(
                name,
                torch.cat([actual[key].flatten() for key in keys]),
                torch.cat([expected[key].flatten() for key in keys]),
                torch.float32 if coarse else state_dtype(dtype),
            )
    for key in actual.keys() & {"returns"}:
        assert actual[key].shape == ()
        assert actual[key].dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    read = {arg.name for arg in op.args} - {arg.name for arg in op.lists if arg.written}
    assert_same_bits(
        tensors_of({name: arguments[name] for name in read}),
        tensors_of({name: before[name] for name in read}),
    )
    return actual


def assert_close_to_exact(name: str, actual: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """`dtype` is the one that the arithmetic was done in.

    A few roundings of the largest number in play, since differences cancel; a reduction adds up to
    64 numbers in a row in float32 before it goes on in float64; and the result is rounded once.
    """
    eps = torch.finfo(dtype).eps
    exact = exact.double()
    finite = exact[exact.isfinite()].abs()
    largest = max(1.0, finite.max().item()) if finite.numel() else 1.0
    rtol = torch.finfo(actual.dtype).eps + (32 * eps if name == "returns" else 4 * eps)
    atol = 0.0 if name == "returns" else 8 * eps * largest
    torch.testing.assert_close(
        actual.double(), exact, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )
