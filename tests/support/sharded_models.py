"""A small model, ways to put it on processes, and what of the data each process gets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

FEATURES, CLASSES = 7, 4  # three processes divide no size here evenly
EXAMPLES, BATCH = 25, 4  # neither two nor three processes get the same number of examples


class Block(nn.Module):
    """A residual block with a gate, of whose bias one process has all."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.gate = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    def __init__(self, width: int = FEATURES, hidden: int = 10) -> None:
        super().__init__()
        self.first, self.second = Block(width, hidden), Block(width, hidden)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x)))


def make_network(dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(1)
    return Network().to(dtype)


# ---------------------------------------------------------------------- ways


@dataclass(frozen=True)
class Way:
    """`wrap` puts a model on `ranks` processes; `ranks / shares` of them read the same data."""

    ranks: int
    shares: int
    wrap: Callable[[Network], nn.Module]

    @property
    def share(self) -> int:
        """Which share of the data this process reads."""
        return dist.get_rank() * self.shares // self.ranks if self.ranks > 1 else 0


@functools.cache
def mesh(*dims: tuple[str, int]) -> DeviceMesh:
    names, sizes = zip(*dims, strict=True)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def sharded(model: Network, on: DeviceMesh | None = None) -> nn.Module:
    for block in (model.first, model.second):
        fully_shard(block, mesh=on)
    return fully_shard(model, mesh=on)


def split(model: Network, on: DeviceMesh) -> nn.Module:
    """Two layers of each block; what is left are plain parameters, the same on each process."""
    layers = {"up": ColwiseParallel, "down": RowwiseParallel}
    names = ("first", "second")
    plan = {f"{name}.{layer}": kind() for name in names for layer, kind in layers.items()}
    return parallelize_module(model, on, plan)


def _split_and_sharded(model: Network) -> nn.Module:
    both = mesh(("data", 2), ("model", 2))
    return sharded(split(model, both["model"]), both["data"])


WAYS = {
    "single": Way(1, 1, lambda model: model),
    "ddp": Way(2, 2, DistributedDataParallel),
    "fsdp": Way(2, 2, sharded),
    "fsdp uneven": Way(3, 3, sharded),
    "tp": Way(2, 1, lambda model: split(model, mesh(("model", 2)))),
    "fsdp+tp": Way(4, 2, _split_and_sharded),
    "hsdp": Way(4, 4, lambda model: sharded(model, mesh(("copies", 2), ("shards", 2)))),
}


def plain(value: Tensor) -> Tensor:
    """A copy of all of it."""
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value.clone()


def plain_parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n.removeprefix("module."): plain(p) for n, p in model.named_parameters()}


# ---------------------------------------------------------------------- data


def make_steps(
    task: int, way: Way, count: int = 6, dtype: torch.dtype = torch.float64
) -> list[tuple[Tensor, Tensor]]:
    """This process's rows of the batches of a task; those of all processes are 12."""
    random = torch.Generator().manual_seed(100 + task)
    shape = (count, 12, FEATURES)
    inputs = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    labels = torch.randint(CLASSES, shape[:2], generator=random)
    rows = slice(way.share, None, way.shares)
    return [(x[rows], y[rows]) for x, y in zip(inputs, labels, strict=True)]


def make_examples(task: int, dtype: torch.dtype = torch.float64) -> TensorDataset:
    """What is measured at the end of a task."""
    random = torch.Generator().manual_seed(200 + task)
    inputs = torch.randn(EXAMPLES, FEATURES, generator=random, dtype=torch.float64).to(dtype)
    return TensorDataset(inputs, torch.randint(CLASSES, (EXAMPLES,), generator=random))


def make_loader(task: int, way: Way, dtype: torch.dtype = torch.float64) -> DataLoader:
    """Batches of this process; the sampler pads, so that some examples come twice."""
    data = make_examples(task, dtype)
    if way.shares == 1:
        return DataLoader(data, BATCH)
    sampler = DistributedSampler(data, way.shares, way.share, shuffle=False)
    return DataLoader(data, BATCH, sampler=sampler)


def all_batches(
    task: int, shares: int, dtype: torch.dtype = torch.float64
) -> Iterable[tuple[Tensor, Tensor]]:
    """The batches of all processes together, without padding."""
    inputs, labels = make_examples(task, dtype).tensors
    for share in range(shares):
        yield from zip(
            inputs[share::shares].split(BATCH), labels[share::shares].split(BATCH), strict=True
        )
