"""Examples of earlier tasks, kept on the device: which of them stay, and how they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.checks import choice, integer
from clext.methods.parts.examples import check_alike
from clext.methods.parts.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from clext.methods.stateful import Commit

# Inputs, labels and keys: a row for each example.
Examples = tuple[Tensor, Tensor, Tensor]

POLICIES = ("reservoir", "balanced")
_KEYS = 2**62  # so many that two examples hardly ever have the same
_ENTRIES = ("inputs", "labels", "keys", "seen", "random")


class Memory:
    """A random choice of all examples seen, in tensors that are allocated once.

    Every example gets a random key when it is seen, and those with the smallest keys stay. So all
    have the same chance, as with the reservoir of Vitter (1985), but a batch is taken in at once:
    no slot is written twice. Nothing here draws on the host.

    Args:
        owner: whose memory it is, for messages.
        budget: how many examples are kept at most.
        policy: "reservoir": every example seen has the same chance to be among them; "balanced":
            every class seen gets the same share of the budget (a class with fewer examples leaves
            the rest of its share to the others), and within a class all have the same chance.
        seed: of the keys and of what `sample` draws.
    """

    def __init__(self, owner: str, budget: int, policy: str, seed: int) -> None:
        self.owner = owner
        self.budget = integer(owner, "budget", budget, minimum=1)
        self.policy = choice(owner, "policy", policy, POLICIES)
        self.seed = integer(owner, "seed", seed, minimum=0)
        self._clear()

    def _clear(self) -> None:
        self.size = 0
        self._seen: dict[int, int] = {}  # examples, by class or all together
        self._buffers: Examples | None = None
        self._random = Sampling(self.seed)

    @property
    def inputs(self) -> Tensor | None:
        """What is kept: [size, ...]; None before the first example."""
        return None if self._buffers is None else self._buffers[0][: self.size]

    @property
    def labels(self) -> Tensor | None:
        """Their labels, int64 [size]."""
        return None if self._buffers is None else self._buffers[1][: self.size]

    def check_shape(self, inputs: Tensor) -> None:
        """ValueError if inputs of a batch do not go together with those that are kept."""
        if self.inputs is not None:
            check_alike(self.owner, inputs, self.inputs, "in the memory", types=False)

    def unless_it_fails(self) -> AbstractContextManager[None]:
        """If what is done inside fails, nothing was drawn there."""
        return self._random.unless_it_fails()

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw inputs [count, ...] and labels [count] on the device, where `size` is not 0.

        Without replacement, unless there are fewer than `count`.
        """
        assert self._buffers is not None
        inputs, labels, _ = self._buffers
        device = labels.device
        random = self._random.on(device)
        if count <= self.size:
            rows = torch.randperm(self.size, generator=random, device=device)[:count]
        else:
            rows = torch.randint(self.size, (count,), generator=random, device=device)
        return inputs.index_select(0, rows), labels.index_select(0, rows)

    # ------------------------------------------------------------------ taking examples in

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Commit:
        """Choose anew between what is kept and the examples of `batches`.

        Args:
            batches: inputs [N, ...] and int64 labels [N], on one device.

        Returns:
            What puts the choice into the memory; nothing is changed before.

        Raises:
            ValueError: inputs have another shape or type than those that are kept.
        """
        choosing = _Choosing(self)
        waiting: list[tuple[Tensor, Tensor]] = []
        for inputs, labels in batches:
            choosing.check(inputs)
            # A loader may use the tensors of a batch again for the next one.
            waiting.append((inputs.clone(), labels.clone()))
            # A choice sorts all keys: not for less than about as many examples as are kept.
            if sum(len(labels) for _, labels in waiting) >= self.budget:
                choosing.add(waiting)
                waiting = []
        if waiting:
            choosing.add(waiting)
        new = choosing.chosen()
        if new is None:
            return lambda: None
        buffers = self._buffers or _allocate(self.budget, new)

        def commit() -> None:
            self.size = len(new[0])
            for buffer, entry in zip(buffers, new, strict=True):
                buffer[: self.size].copy_(entry)
            self._buffers = buffers
            self._seen, self._random = choosing.seen, choosing.random or self._random

        return commit

    # ------------------------------------------------------------------ state

    def move(self, device: torch.device) -> None:
        """Move everything to `device`. On another one other examples will be drawn."""
        if self._buffers is not None:
            inputs, labels, keys = (entry.to(device) for entry in self._buffers)
            self._buffers = inputs, labels, keys

    def state_dict(self) -> dict[str, Any]:
        """Everything but the options, as copies; {} before the first example."""
        if self._buffers is None:
            return {}
        inputs, labels, keys = (entry[: self.size].clone() for entry in self._buffers)
        random = self._random.state_dict()
        seen = dict(self._seen)
        return {"inputs": inputs, "labels": labels, "keys": keys, "seen": seen, "random": random}

    def prepare_load(self, given: object, device: torch.device) -> Commit:
        """Check what `state_dict` returned, ValueError if it is not; returns what takes it."""
        owner = f"{self.owner}: the memory of a state_dict"
        if given == {}:
            return self._clear
        state = _checked_state(owner, given)
        _check_seen(owner, state["seen"], state["labels"], self.policy)
        size = len(state["labels"])
        if size > self.budget:
            raise ValueError(
                f"{owner} has {size} examples and the budget is {self.budget}; make the method "
                "with the budget that it was saved with"
            )
        loaded = Memory(self.owner, self.budget, self.policy, self.seed)
        given_rows = tuple(state[name].to(device) for name in ("inputs", "labels", "keys"))
        loaded._buffers = _allocate(self.budget, given_rows)
        for buffer, entry in zip(loaded._buffers, given_rows, strict=True):
            buffer[:size].copy_(entry)
        loaded.size, loaded._seen = size, dict(state["seen"])
        loaded._random = Sampling.load(f"{owner}['random']", self.seed, state["random"], device)
        return lambda: self.__dict__.update(loaded.__dict__)


class _Choosing:
    """What a memory will be once all batches are seen; of the inputs only the chosen are held."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.seen = dict(memory._seen)
        self.random: Sampling | None = None  # a copy: nothing is drawn if this choice is not taken
        # What was chosen so far: labels, keys, and at which row of the joined pieces it is.
        self._pieces: list[Tensor] = []
        self._rows = 0
        self._state: tuple[Tensor, Tensor, Tensor] | None = None
        self._like = memory.inputs
        if memory._buffers is not None:
            inputs, labels, keys = (entry[: memory.size] for entry in memory._buffers)
            self._hold(inputs)
            self._state = labels, keys, torch.arange(memory.size, device=labels.device)

    def add(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        """Choose between what was chosen so far and these batches."""
        inputs, labels = (torch.cat(entries) for entries in zip(*batches, strict=True))
        device = labels.device
        if self.random is None:
            memory = self._memory
            before = memory._random.state_dict()
            self.random = Sampling.load(memory.owner, memory.seed, before, device)
        keys = torch.randint(_KEYS, (len(labels),), generator=self.random.on(device), device=device)
        rows = torch.full_like(keys, -1)
        old = 0
        if self._state is not None:
            old = len(self._state[0])
            entries = zip(self._state, (labels, keys, rows), strict=True)
            labels, keys, rows = (torch.cat(pair) for pair in entries)
        groups = _groups(labels, self._memory.policy)
        for group, count in _counts(groups[old:]):
            self.seen[group] = self.seen.get(group, 0) + count
        chosen = _smallest(groups, keys, _shares(self.seen, self._memory.budget))
        labels, keys, rows = (entry.index_select(0, chosen) for entry in (labels, keys, rows))
        new = chosen[chosen >= old] - old
        start = self._rows
        self._hold(inputs.index_select(0, new))
        # The chosen are in order, so the new ones are the last.
        rows[len(rows) - len(new) :] = torch.arange(start, self._rows, device=device)
        self._state = labels, keys, rows

    def chosen(self) -> Examples | None:
        """Inputs, labels and keys; None if there was no example at all."""
        if self._state is None:
            return None
        labels, keys, rows = self._state
        return torch.cat(self._pieces).index_select(0, rows), labels, keys

    def _hold(self, inputs: Tensor) -> None:
        self._pieces.append(inputs)
        self._rows += len(inputs)

    def check(self, inputs: Tensor) -> None:
        """ValueError unless inputs are like those that are kept, and those of earlier batches."""
        if self._like is None:
            self._like = inputs[:0]
        check_alike(self._memory.owner, inputs, self._like, "in the memory")


def _allocate(rows: int, entries: Examples) -> Examples:
    """Room for so many rows like those of `entries`."""
    inputs, labels, keys = (entry.new_empty(rows, *entry.shape[1:]) for entry in entries)
    return inputs, labels, keys


def _groups(labels: Tensor, policy: str) -> Tensor:
    """Whom each example shares the budget with: its class, or all."""
    return labels if policy == "balanced" else torch.zeros_like(labels)


def _counts(groups: Tensor) -> Iterator[tuple[int, int]]:
    """Each group and how many examples it has."""
    names, counts = groups.unique(return_counts=True)
    return zip(names.tolist(), counts.tolist(), strict=True)


def _shares(seen: Mapping[int, int], budget: int) -> dict[int, int]:
    """How many examples of each class stay, where so many were seen.

    All have the same share; what a small class leaves is shared by the others, and what is left of
    the division goes to the first classes, one each. A share never grows while examples are added,
    so those with the smallest keys of all that were seen are always at hand.
    """
    left, level = budget, budget
    counts = sorted(seen.values())
    for place, count in enumerate(counts):
        level = left // (len(counts) - place)
        if count > level:
            left -= level * (len(counts) - place)
            break
        left -= count
    else:
        return dict(seen)
    shares = {}
    for group in sorted(seen):
        extra = int(seen[group] > level and left > 0)
        shares[group] = min(seen[group], level) + extra
        left -= extra
    return shares


def _smallest(groups: Tensor, keys: Tensor, shares: Mapping[int, int]) -> Tensor:
    """The places, in order, of those with the smallest keys of each group, so many of each."""
    order = keys.argsort(stable=True)
    order = order.index_select(0, groups.index_select(0, order).argsort(stable=True))
    sorted_groups = groups.index_select(0, order)
    names = torch.tensor(sorted(shares), device=groups.device)
    counts = torch.tensor([shares[name] for name in sorted(shares)], device=groups.device)
    which = torch.searchsorted(names, sorted_groups)
    starts = torch.searchsorted(sorted_groups, names)
    rank = torch.arange(len(order), device=groups.device) - starts.index_select(0, which)
    return order[rank < counts.index_select(0, which)].sort().values


def _checked_state(owner: str, given: object) -> dict[str, Any]:
    if not isinstance(given, dict) or set(given) != set(_ENTRIES):
        got = sorted(given, key=str) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{owner} is {got}, expected {', '.join(_ENTRIES)}")
    for name in ("inputs", "labels", "keys"):
        entry = given[name]
        if not isinstance(entry, Tensor) or entry.layout != torch.strided or entry.is_meta:
            raise ValueError(f"{owner}: {name!r} is {type(entry).__name__}, expected a tensor")
    labels, size = given["labels"], len(given["inputs"])
    for name in ("labels", "keys"):
        entry = given[name]
        if entry.dtype != torch.int64 or entry.shape != (size,):
            raise ValueError(
                f"{owner}: {name!r} is {entry.dtype} {list(entry.shape)}, expected int64 [{size}]"
            )
    seen = given["seen"]
    if size == 0 or int(labels.min()) < 0:
        raise ValueError(f"{owner} holds no examples, or labels below 0")
    if not isinstance(seen, dict) or any(
        type(number) is not int or number < 0 for pair in seen.items() for number in pair
    ):
        raise ValueError(f"{owner}: 'seen' is {seen!r}, expected a count for each class")
    return given


def _check_seen(owner: str, seen: Mapping[int, int], labels: Tensor, policy: str) -> None:
    """ValueError if examples were counted by another policy: the next choice would be wrong."""
    kept = dict(_counts(_groups(labels, policy)))
    alike = policy == "balanced" or seen.keys() == kept.keys()
    if not alike or any(seen.get(group, 0) < count for group, count in kept.items()):
        raise ValueError(
            f"{owner}: 'seen' is {dict(seen)}, which does not count its examples as the policy "
            f"{policy!r} does; make the method with the policy that it was saved with"
        )
