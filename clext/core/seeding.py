"""One seed for everything random in a run, and a global random state left as it was."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Seeds:
    """Independent seeds of a run, all derived from one number.

    `model` starts the initial weights and what the model draws (dropout), `scenario` draws the
    tasks (permutations), `shuffle` the order of the examples, `method` whatever a method samples.
    """

    model: int
    scenario: int
    shuffle: int
    method: int

    @classmethod
    def derive(cls, seed: int) -> Seeds:
        """Spread one seed over independent streams, so that no two of them are correlated."""
        words = np.random.SeedSequence(seed).generate_state(4, np.uint32)
        return cls(*(int(word) for word in words))


# Far from the seeds of a study's runs, which follow each other.
_STRIDE = 0x9E3779B97F4A7C15


class CpuGenerator(torch.Generator):
    """A generator whose draws are the same whatever device the run is on."""

    def __reduce__(self) -> tuple[Any, ...]:
        # No tensor made here: it would be gone before another process had it.
        return restored, (0, self.get_state().numpy())


def generator(seed: int, process: int = 0) -> CpuGenerator:
    """Such a generator, started by `seed`; another one on each of several processes."""
    random = CpuGenerator()
    random.manual_seed((seed + process * _STRIDE) % 2**63)
    return random


def restored(seed: int, state: object) -> CpuGenerator:
    """A generator in the state that another one had; started by `seed` where that is unknown.

    Formerly a state was a dict with the device beside it, and empty before the first draw.
    """
    random = generator(seed)
    if isinstance(state, Mapping):
        state = state["state"] if state.get("device") == "cpu" else None
    if state is not None:
        random.set_state(torch.as_tensor(state).cpu())
    return random


def linear(inputs: int, outputs: int, random: torch.Generator | None = None) -> nn.Linear:
    """An `nn.Linear` whose weights `random` draws; those that its constructor draws with that seed.

    By default they are drawn from torch's global generator, as there.
    """
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=random)
    bound = 1 / math.sqrt(inputs)
    nn.init.uniform_(layer.bias, -bound, bound, generator=random)
    return layer


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of `device` inside, and restore them afterwards.

    `torch.manual_seed` would also reseed every other accelerator, and `fork_rng` knows no mps. The
    generators are the process's own: what other threads draw meanwhile comes from them too, but
    whichever thread leaves last restores what was there before the first one came.
    """
    with _isolated_generator(seed, torch.device("cpu")):
        if device.type == "cpu":
            yield
            return
        with torch.accelerator.device_index(device.index), _isolated_generator(seed, device):
            yield


_lock = threading.Lock()
# For each device the states to restore, of those who are inside, in the order in which they came.
_before: dict[torch.device, list[list[Tensor]]] = {}


def random_states(device: torch.device) -> list[Tensor]:
    """Of the global generators of the CPU and of `device`, as `isolated_rng` has seeded them."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device.type).get_rng_state())
    return states


def set_random_states(device: torch.device, states: Sequence[Tensor]) -> None:
    """Set what `random_states` returned, on a device of the same type."""
    torch.set_rng_state(states[0])
    if device.type != "cpu" and len(states) > 1:
        torch.get_device_module(device.type).set_rng_state(states[1])


@contextmanager
def _isolated_generator(seed: int, device: torch.device) -> Iterator[None]:
    random = torch.random if device.type == "cpu" else torch.get_device_module(device.type)
    manual_seed = (
        torch.default_generator.manual_seed if device.type == "cpu" else random.manual_seed
    )
    with _lock:
        states = _before.setdefault(device, [])
        own = [random.get_rng_state()]
        states.append(own)
        manual_seed(seed)
    try:
        yield
    finally:
        with _lock:
            place = next(i for i, state in enumerate(states) if state is own)
            if own is states[-1]:
                random.set_rng_state(own[0])
            else:  # whoever came next restores what was there before this one
                states[place + 1][0] = own[0]
            del states[place]
