"""The random numbers of a method: drawn on its device, from its seed, and saved with its state."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator


class Sampling:
    """A generator of random numbers on the device where they are needed, made when first asked for.

    Args:
        seed: of the first generator.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generator: torch.Generator | None = None

    def on(self, device: torch.device) -> torch.Generator:
        """The generator on `device`; on another one than before it starts anew, from its state."""
        generator = self._generator
        if generator is None or generator.device != device:
            seed = self._seed if generator is None else _seed_of(generator.get_state())
            generator = self._generator = torch.Generator(device).manual_seed(seed)
        return generator

    @contextmanager
    def unless_it_fails(self) -> Iterator[None]:
        """If what is done inside fails, nothing was drawn there."""
        before = self._generator
        state = None if before is None else before.get_state()
        try:
            yield
        except BaseException:
            if before is not None and state is not None:
                before.set_state(state)
            self._generator = before
            raise

    def state_dict(self) -> dict[str, object]:
        """The state of the generator, and on what kind of device it is; {} if none was needed."""
        if self._generator is None:
            return {}
        return {"device": self._generator.device.type, "state": self._generator.get_state()}

    @classmethod
    def load(cls, owner: str, seed: int, given: object, device: torch.device) -> Sampling:
        """What `state_dict` was made of, on `device`.

        Raises:
            ValueError: `given`, called `owner` in the message, is no such state.
        """
        sampling = cls(seed)
        if given == {}:
            return sampling
        state = given.get("state") if isinstance(given, dict) else None
        if not isinstance(state, Tensor) or state.dtype != torch.uint8 or state.dim() != 1:
            raise ValueError(f"{owner} is no state of a generator of random numbers")
        assert isinstance(given, dict)
        if given.get("device") != device.type:
            sampling._generator = torch.Generator(device).manual_seed(_seed_of(state))
            return sampling
        try:
            sampling.on(device).set_state(state.cpu())
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{owner} is no state of a generator on {device}: {error}") from None
        return sampling


def _seed_of(state: Tensor) -> int:
    """A seed that follows from a generator's state: what comes next is new, and the same again."""
    digest = hashlib.sha256(bytes(state.tolist())).digest()
    return int.from_bytes(digest[:8], "little") >> 1
