"""Processes: those that train one model together, and what they have to tell each other."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from clext.core.inputs import Inputs, mapped
from clext.core.parameters import memory_of
from clext.core.seeding import CpuGenerator, generator
from clext.core.sharding import is_sharded

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Processes each of which has seen other data; one alone without `groups`.

    `groups`: of torch.distributed, one for each dimension of a mesh. Every call is made by all.
    """

    groups: tuple[Any, ...] = ()
    rank: int = 0
    size: int = 1

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each by its sum over the processes; no others lie in the same memory."""
        for group in self.groups:
            for buffer in memory_of(tensors):
                dist.all_reduce(buffer, group=group)

    @torch.no_grad()
    def follow_first_(self, tensors: Iterable[Tensor]) -> None:
        """Give each the values that it has on the first process."""
        copies = [entry for entry in tensors if not is_sharded(entry)]
        for group in self.groups:
            for entry in copies:
                values = entry.contiguous()
                dist.broadcast(values, group=group, group_src=0)
                entry.copy_(values)

    def gathered(self, own: T) -> list[T]:
        """What each has, the same list everywhere."""
        found = [own]
        for group in self.groups:
            lists: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(lists, found, group=group)
            found = [entry for some in lists for entry in some]
        return found

    def gathered_rows(self, own: Inputs) -> list[Inputs]:
        """The same of tensors in tuples, lists and mappings, which come back on the CPU."""
        return self.gathered(mapped(Tensor.cpu, own))

    def own_generator(self, common: CpuGenerator) -> CpuGenerator:
        """One whose draws are others on each process, of a `common` one that stays common."""
        if not self.groups:
            return common
        return generator(int(torch.randint(2**62, (), generator=common)), self.rank)

    def share(self, count: int) -> int:
        """How many of `count` rows that all have together are this process's."""
        return len(range(self.rank, count, self.size))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process cannot do inside, none has done: RuntimeError on the others."""
        if not self.groups:
            yield
            return
        try:
            yield
        except Exception as error:
            self.gathered(f"process {self.rank}: {error}")
            raise
        failed = [found for found in self.gathered(None) if found is not None]
        if failed:
            raise RuntimeError(f"another process could not go on: {failed[0]}")

    def check_equal(self, owner: str, named: Mapping[str, Tensor]) -> None:
        """ValueError unless all have the same, where they should be copies."""
        copies = {name: entry for name, entry in named.items() if not is_sharded(entry)}
        if not copies:
            return
        found = [entry.detach().sum(dtype=torch.float64).cpu() for entry in copies.values()]
        sums = torch.stack(found).nan_to_num().tolist()
        different = [len(set(values)) > 1 for values in zip(*self.gathered(sums), strict=True)]
        if any(different):
            raise ValueError(
                f"{owner}: {[*copies][different.index(True)]} differs between the {self.size} "
                "processes, expected copies of one model, trained alike: make the method of the "
                "model in its DistributedDataParallel wrapper, with the same options everywhere, "
                "and pull when gradients are complete (not in no_sync()); sync=False is for models "
                "that are trained apart"
            )


ALONE = Processes()


def processes_of(model: nn.Module) -> Processes:
    """Those with other data for this model: as its wrapper or mesh says, else all that there are.

    One alone for a model under tensor parallelism, which all see the same data.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    kinds = _wrapper_kinds()
    wrappers = [module for module in model.modules() if isinstance(module, kinds)]
    for wrapper in wrappers:
        if isinstance(wrapper, DistributedDataParallel):
            return _of_group(wrapper.process_group)
        state: Any = wrapper._get_fsdp_state()  # type: ignore[operator]
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            if group is not None:  # a module all of whose parameters belong to others has none
                return _of_mesh(group.mesh_info.mesh)
    if any(map(is_sharded, model.parameters())):
        return ALONE
    return _of_group(dist.group.WORLD)


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called with."""
    kinds = _wrapper_kinds()[1:]
    return [module for module in model.modules() if isinstance(module, kinds)] if kinds else []


def _wrapper_kinds() -> tuple[type, ...]:
    """DDP's, and FSDP2's if somebody has imported it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return (DistributedDataParallel,) if kind is None else (DistributedDataParallel, kind)


def _of_group(group: Any) -> Processes:  # noqa: ANN401
    size = dist.get_world_size(group)
    return Processes((group,), dist.get_rank(group), size) if size > 1 else ALONE


def _of_mesh(mesh: Any) -> Processes:  # noqa: ANN401
    rank = 0
    for place, size in zip(mesh.get_coordinate(), mesh.shape, strict=True):
        rank = rank * size + place
    groups = tuple(mesh.get_all_groups())
    return Processes(groups, rank, mesh.size()) if mesh.size() > 1 else ALONE


def inner(model: nn.Module) -> nn.Module:
    """The model in the wrapper of DDP, or itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Forward passes inside go past DDP's wrapper, which would wait for the other processes."""
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) and "forward" not in module.__dict__
    ]
    for wrapper in wrappers:
        wrapper.__dict__["forward"] = wrapper.module  # assigned, it would be a submodule
    try:
        yield
    finally:
        for wrapper in wrappers:
            del wrapper.__dict__["forward"]


def own_rows(loader: object) -> int | None:
    """How many rows that a loader gives this process come first and are no padding; None: all.

    A `DistributedSampler`, and accelerate's sampler of batches, repeat rows at the end so that all
    processes have as many.
    """
    batches: Any = getattr(loader, "batch_sampler", None)
    sampler = getattr(batches, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        if sampler.drop_last:
            return None
        return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]
    if getattr(batches, "even_batches", False):  # accelerate's BatchSamplerShard
        sampler = getattr(batches.batch_sampler, "sampler", None)
        parts, first = batches.num_processes, batches.process_index
        if sampler is not None and batches.batch_size is not None:
            size: int = batches.batch_size // (parts if batches.split_batches else 1)
            rows = len(sampler)
            return sum(min(size, rows - k) for k in range(first * size, rows, parts * size))
    return None
