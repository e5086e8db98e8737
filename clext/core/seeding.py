"""One seed for everything random in a run, and a global random state left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Seeds:
    """Independent seeds of a run, all derived from one number.

    `model` starts the global generators (initial weights, dropout), `scenario` draws the tasks
    (permutations), `shuffle` the order of the examples, `method` whatever a method samples.
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


def generator(seed: int) -> torch.Generator:
    """A CPU generator: what it draws is the same whatever device the run is on."""
    return torch.Generator().manual_seed(seed)


def restored(seed: int, state: object) -> torch.Generator:
    """A CPU generator in the state that another one had; started by `seed` where that is unknown.

    Formerly a state was a dict with the device beside it, and empty before the first draw.
    """
    random = generator(seed)
    if isinstance(state, Mapping):
        state = state["state"] if state.get("device") == "cpu" else None
    return random if state is None else random.set_state(torch.as_tensor(state).cpu())


@contextmanager
def isolated_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of the CPU and of `device` inside, and restore them afterwards.

    `torch.manual_seed` would also reseed every other accelerator, and `fork_rng` knows no mps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if device.type == "cpu":
            yield
            return
        accelerator = torch.get_device_module(device.type)
        with torch.accelerator.device_index(device.index):
            state = accelerator.get_rng_state()
            try:
                accelerator.manual_seed(seed)
                yield
            finally:
                accelerator.set_rng_state(state)
