"""The collectives of a step and of the end of a task: how many, of how many bytes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from sharded_models import CLASSES, WAYS, Network
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clext

NAMESPACES = ("c10d", "_c10d_functional", "_dtensor")
SILENT = ("wait_tensor", "_wrap_tensor_autograd")  # send nothing


class Collectives(TorchDispatchMode):
    """Counts those of DDP, FSDP2, DTensor and torch.distributed's functions on this process.

    `calls` by the op's name, and `bytes`, those of all tensors that an op is given: what it sends
    and where it receives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if DTensor in types:  # first what it is made of
            return NotImplemented
        if func.namespace in NAMESPACES and func._opname not in SILENT:
            self.calls[func._opname] += 1
            tensors = (entry for entry in tree_leaves(args) if isinstance(entry, Tensor))
            self.bytes += sum(entry.nbytes for entry in tensors)
        return func(*args, **(kwargs or {}))


# ---------------------------------------------------------------------- contestants


def _plain(model: nn.Module) -> tuple[None, torch.optim.Optimizer]:
    return None, torch.optim.Adam(model.parameters())


def _attached(kind: type[clext.Method]) -> Any:
    def made(model: nn.Module) -> tuple[clext.Method, torch.optim.Optimizer]:
        method, optimizer = kind(model), torch.optim.Adam(model.parameters())
        method.attach(optimizer)
        return method, optimizer

    return made


def _fused(**options: Any) -> Any:
    def made(model: nn.Module) -> tuple[clext.Method, torch.optim.Optimizer]:
        method = clext.SI(model)
        return method, clext.optim.Adam(model.parameters(), method=method, **options)

    return made


# Each beside the training that it is compared with, which clips by torch's function if it clips.
CONTESTANTS = {
    "EWC": (_attached(clext.EWC), "without"),
    "SI": (_attached(clext.SI), "without"),
    "RWalk": (_attached(clext.RWalk), "without"),
    "SI in clext.optim.Adam": (_fused(), "without"),
    "the same, max_grad_norm": (_fused(max_grad_norm=0.1), "without, clipped"),
}
BASES = {"without": _plain, "without, clipped": _plain}


def counted(way_name: str, contestant: str, width: int, hidden: int) -> dict[str, Any]:
    """Calls by name and bytes of a step of the second task, and of the end of the first."""
    way = WAYS[way_name]
    torch.manual_seed(0)
    model = way.wrap(Network(width, hidden))
    make = BASES[contestant] if contestant in BASES else CONTESTANTS[contestant][0]
    method, optimizer = make(model)
    random = torch.Generator().manual_seed(way.share)
    batches = [
        (
            torch.randn(8, width, generator=random),
            torch.randint(CLASSES, (8,), generator=random),
        )
        for _ in range(12)
    ]

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y).backward()
        if contestant == "without, clipped":
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    for batch in batches:  # DDP has arranged its buckets, RWalk closes an interval
        step(*batch)
    with Collectives() as end:
        if method is not None:
            method.consolidate(batches)
    step(*batches[0])
    with Collectives() as second:
        for batch in batches:
            step(*batch)
    steps = len(batches)
    return {
        "calls": {name: calls / steps for name, calls in second.calls.items()},
        "bytes": second.bytes / steps,
        "end": {"calls": dict(end.calls), "bytes": end.bytes},
    }
