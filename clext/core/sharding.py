"""Sharded tensors: of a DTensor this process has a part, and all else is whole."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


T = TypeVar("T", Tensor, float)


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor, as FSDP2 and tensor parallel make parameters."""
    module = sys.modules.get("torch.distributed.tensor")  # takes a second to import
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory, outside of autograd; the tensor itself if whole."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def check_meshes(owner: str, tensors: Iterable[Tensor]) -> None:
    """ValueError unless the mesh of one of them has all the processes that have parts of others."""
    meshes: list[Any] = [entry.device_mesh for entry in tensors if is_sharded(entry)]  # type: ignore[attr-defined]
    ranks = [set(mesh.mesh.flatten().tolist()) for mesh in dict.fromkeys(meshes)]
    if not all(some <= max(ranks, key=len) for some in ranks):
        raise ValueError(
            f"{owner}: its parameters are sharded over meshes that cross, "
            f"{' and '.join(map(str, ranks))}, expected one mesh, or parts of one; make both of a "
            "mesh with two dimensions"
        )


def whole(tensor: Tensor) -> Tensor:
    """All of it, gathered from the processes, on the device of their mesh."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    found: Tensor = sharded.to(sharded.device_mesh.device_type).full_tensor()
    return found


def part_of(like: Tensor, value: Tensor) -> Tensor:
    """What this process has of a `value`, whole or sharded in any way, once it is as `like` is."""
    if is_sharded(value):
        if is_sharded(like) and _places(value) == _places(like):
            return local(value)
        value = whole(value)
    if not is_sharded(like):
        return value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sharded: Any = like
    sizes, starts = compute_local_shape_and_global_offset(
        sharded.shape, sharded.device_mesh, sharded.placements
    )
    places = zip(starts, sizes, strict=True)
    return value[tuple(slice(start, start + size) for start, size in places)]


def sharded_as(like: Tensor, part: Tensor) -> Tensor:
    """The tensor of which this process has `part`, sharded as `like` is."""
    if not is_sharded(like):
        return part
    given: Any = like
    made: Tensor = type(given).from_local(
        part,
        given.device_mesh,
        given.placements,
        run_check=False,
        shape=given.shape,
        stride=given.stride(),
    )
    return made


def gradient_part(parameter: Tensor) -> Tensor | None:
    """This process's part of the gradient, which is first put where the parameter is.

    Of a layer that sees a part of each sequence, each process has a share of the sum (tensor
    parallel with SequenceParallel); an optimizer's step has to sum it, whoever takes it.
    """
    gradient: Any = parameter.grad
    if is_sharded(gradient) and _places(gradient) != _places(parameter):
        placements = parameter.placements  # type: ignore[attr-defined]
        parameter.grad = gradient.redistribute(placements=placements)
    return None if parameter.grad is None else local(parameter.grad)


def _places(tensor: Any) -> tuple[object, ...]:  # noqa: ANN401
    return tensor.device_mesh, *tensor.placements


def number_of_parts(tensor: Tensor) -> int:
    """How many different parts there are; processes beyond these have copies."""
    if not is_sharded(tensor):
        return 1
    sharded: Any = tensor
    sizes = zip(sharded.device_mesh.shape, sharded.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def plus(value: Tensor, other: Tensor | float) -> Tensor:
    """The sum of two numbers; where one is still to be summed over processes, such a number."""
    mesh = Mesh([value, *([other] if isinstance(other, Tensor) else [])])
    part = mesh.share(local(value), number_of_parts(value))
    if isinstance(other, Tensor):
        more: Any = mesh.share(local(other), number_of_parts(other)).to(part.device)
    else:
        more = mesh.share(other, 1)
    return mesh.total(part + more)


class Mesh:
    """The processes that have the parts of some tensors, all of which none or one mesh holds.

    Tensors on a part of it, or whole ones, are there several times.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        meshes: list[Any] = [entry.device_mesh for entry in tensors if is_sharded(entry)]  # type: ignore[attr-defined]
        self._mesh: Any = max(meshes, key=lambda mesh: mesh.size(), default=None)

    def __bool__(self) -> bool:
        return self._mesh is not None

    def share(self, value: T, parts: int) -> T:
        """What this process adds to a sum over all, of a number that only `parts` have for all."""
        return cast("Any", value) * (parts / self._mesh.size()) if self else value

    def total(self, value: Tensor) -> Tensor:
        """The sum of a number over the processes, for whoever calls `full_tensor()` of it."""
        return self._over_all(value, "sum") if self else value

    def any(self, flags: Tensor) -> Tensor:
        """Which of these are set on one of the processes, bool."""
        return whole(self._over_all(flags.double(), "max")) > 0 if self else flags

    def largest(self, tensors: Sequence[Tensor]) -> Tensor:
        """The largest element of all that the processes have, 0-dim float64."""
        found = [entry.max().double() for entry in tensors if entry.numel() > 0]
        lowest = torch.tensor(-torch.inf, dtype=torch.float64)
        return whole(self._over_all(torch.stack(found).max() if found else lowest, "max"))

    def _over_all(self, value: Tensor, how: str) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        value = value.to(self._mesh.device_type)
        placements = [Partial(how)] * self._mesh.ndim
        return DTensor.from_local(value, self._mesh, placements, run_check=False)
