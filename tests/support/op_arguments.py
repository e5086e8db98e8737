"""How the registry of the tests describes an op: its arguments, valid and invalid numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clext import ops, reference
from clext.ops._extension import C

ROWS, SLICES = 3, 5

Arguments = dict[str, Any]  # in schema order: lists of tensors, tensors and numbers

# The lists that a step takes from a plan's state, and their keys there.
STATE_KEYS = {
    "momentum_buffers": "momentum_buffer",
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "path": "path",
    "fisher": "fisher",
    "anchors": "anchor",
    "importances": "importance",
}


@dataclass(frozen=True)
class ListArg:
    """A list of tensors. `access`: read, update or write.

    `kind`: parameter, state, consolidated (state that may be bfloat16 instead of float32) or rows.
    """

    name: str
    kind: str
    access: str = "read"
    nonnegative: bool = False

    @property
    def written(self) -> bool:
        return self.access != "read"


@dataclass(frozen=True)
class Counts:
    """A written list of one 0-dim whole number per tensor, in the state's dtype."""

    name: str


@dataclass(frozen=True)
class Unused:
    """A list that is empty in this entry's calls."""

    name: str


@dataclass(frozen=True)
class Fixed:
    """A flag, or an optional tensor that is not given."""

    name: str
    value: bool | None = None


@dataclass(frozen=True)
class TensorArg:
    """A tensor; of normal random numbers unless there is a `value`."""

    name: str
    shape: tuple[int, ...]
    value: float | None = None
    dtype: torch.dtype | None = None  # the widest state's unless given


@dataclass(frozen=True)
class Scalar:
    """A number; `edges` are the outermost ones that are still valid."""

    name: str
    value: float
    invalid: tuple[float, ...]
    edges: tuple[float, float]


def params(access: str = "read") -> ListArg:
    return ListArg("params", "parameter", access)


def grads(access: str = "read") -> ListArg:
    return ListArg("grads", "parameter", access)


def state(name: str, access: str = "read") -> ListArg:
    """State of any sign."""
    return ListArg(name, "state", access)


def weights(name: str, access: str = "read") -> ListArg:
    """State that is never negative, and 0 for half of the elements."""
    return ListArg(name, "state", access, nonnegative=True)


def anchors(access: str = "read") -> ListArg:
    return ListArg("anchors", "consolidated", access)


def importances(access: str = "read") -> ListArg:
    """Never negative, as `weights`."""
    return ListArg("importances", "consolidated", access, nonnegative=True)


NAN, INF = float("nan"), float("inf")


def at_least_zero(name: str, value: float) -> Scalar:
    return Scalar(name, value, (-1.0, -1e-9, NAN, INF, -INF), (0.0, 1e30))


def above_zero(name: str, value: float) -> Scalar:
    return Scalar(name, value, (0.0, -1.0, NAN, INF), (1e-30, 1e30))


def fraction(name: str, value: float) -> Scalar:
    return Scalar(name, value, (-0.1, 1.0000001, NAN, INF), (0.0, 1.0))


def below_one(name: str, value: float) -> Scalar:
    return Scalar(name, value, (-0.1, 1.0, NAN, INF), (0.0, 0.9999999))


def any_number(name: str, value: float) -> Scalar:
    return Scalar(name, value, (NAN, INF, -INF), (-1e30, 1e30))


@dataclass(frozen=True)
class Example:
    """Numbers worked out by hand: inputs, and what the written lists and "returns" become."""

    inputs: dict[str, Any]
    outputs: dict[str, Any]


Arg = ListArg | Counts | Unused | Fixed | TensorArg | Scalar


@dataclass(frozen=True)
class Op:
    name: str
    args: tuple[Arg, ...]
    examples: tuple[Example, ...]
    layout: str = "params"  # the list that gives shapes and strides
    mixed_dtypes: bool = True  # float32 and float64 parameters in one call
    couples_tensors: bool = False  # an element of importances depends on all tensors of the call
    variant: str = ""  # for an op with several entries
    returns: tuple[int, ...] = ()  # shape of the tensor that is returned, if one is
    returns_double: bool = False  # whatever the dtype of the lists
    fused: bool = False  # a step of an optimizer: by a plan, and all but the lists by name

    @property
    def lists(self) -> list[ListArg]:
        return [arg for arg in self.args if isinstance(arg, ListArg)]

    @property
    def scalars(self) -> list[Scalar]:
        return [arg for arg in self.args if isinstance(arg, Scalar)]

    @property
    def written(self) -> list[str]:
        """Names of the lists that a call changes."""
        return [
            arg.name
            for arg in self.args
            if isinstance(arg, Counts) or (isinstance(arg, ListArg) and arg.written)
        ]

    @property
    def keywords(self) -> list[str]:
        """Names of the arguments that are passed by name."""
        kinds = (Fixed, Scalar, TensorArg) if self.fused else Fixed
        return [arg.name for arg in self.args if isinstance(arg, kinds)]

    def split(self, arguments: Arguments) -> tuple[list[Any], dict[str, Any]]:
        """What is passed by position, and what by name."""
        named = {name: value for name, value in arguments.items() if name in self.keywords}
        return [value for name, value in arguments.items() if name not in named], named

    def kernel(self, arguments: Arguments) -> Any:
        by_position, by_name = self.split(arguments)
        if self.fused:
            return self._by_plan(arguments, by_name)
        return getattr(ops, self.name)(*by_position, **by_name)

    def reference(self, arguments: Arguments) -> Any:
        by_position, by_name = self.split(arguments)
        value = getattr(reference, self.name)(*by_position, **by_name)
        return value if not self.fused or arguments["anchors"] else None

    def _by_plan(self, lists: Arguments, options: Arguments) -> Any:
        """The step of a plan over the lists of `arguments` themselves."""
        for theta, grad in zip(lists["params"], lists["grads"], strict=True):
            theta.grad = grad
        names = [str(index) for index in range(len(lists["params"]))]
        state = {key: lists[name] for name, key in STATE_KEYS.items() if lists.get(name)}
        plan = C.ParameterPlan(names, lists["params"], state, lists["steps"])
        try:
            return getattr(plan, self.name)(**options)
        finally:
            for theta in lists["params"]:
                theta.grad = None

    def __str__(self) -> str:
        return f"{self.name} {self.variant}".strip()
