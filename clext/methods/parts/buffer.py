"""The replay buffer: which examples of earlier tasks are kept, and how they are drawn."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.batches import check_alike
from clext.core.inputs import concatenated, described, flatten, mapped, taken
from clext.core.processes import ALONE, Processes
from clext.core.seeding import CpuGenerator, generator, restored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from clext.core.inputs import Inputs

POLICIES = ("reservoir", "balanced")
_KEYS = 2**62  # so many that two examples hardly ever have the same
_ROWS = ("inputs", "labels", "keys")


class ReplayBuffer:
    """A random choice of all examples seen.

    Every example gets a random key when it is seen, and those with the smallest keys stay: all have
    the same chance, as with the reservoir of Vitter (1985), however they come in.

    Args:
        budget: how many examples are kept at most.
        policy: "reservoir": every example seen has the same chance to be among them; "balanced":
            every class seen gets the same share of the budget (a class with fewer examples leaves
            the rest of its share to the others), and within a class all have the same chance.
        seed: of the keys and of what `sample` draws.
    """

    def __init__(self, budget: int, policy: str, seed: int) -> None:
        self.budget, self.policy, self.seed = budget, policy, seed
        self._rows: tuple[Any, ...] = ()
        self._room: list[Tensor] | None = None  # that rows of a stream are the first part of
        self._seen: Counter[int] = Counter()  # examples, by class or all together
        self._random = generator(seed)

    @property
    def rows(self) -> tuple[Any, ...]:
        """Inputs, labels and keys, a row for each example; () before the first."""
        return self._rows

    @rows.setter
    def rows(self, rows: tuple[Any, ...]) -> None:
        self._rows, self._room = rows, None

    def __len__(self) -> int:
        return len(self.rows[1]) if self.rows else 0

    def sample(self, count: int, processes: Processes = ALONE) -> tuple[Inputs, Tensor]:
        """Draw inputs [count, ...] and labels [count], where there are examples.

        Without replacement, unless there are fewer than `count`. Several processes, all of which
        keep the same, draw together, and each takes its part.
        """
        total = count * processes.size
        if total <= len(self):
            places = torch.randperm(len(self), generator=self._random)[:total]
        else:
            places = torch.randint(len(self), (total,), generator=self._random)
        places = places[processes.rank :: processes.size]
        inputs, labels = taken(self.rows[:2], places.to(self.rows[1].device))
        return inputs, labels

    def add(
        self, owner: str, batches: Iterable[tuple[Inputs, Tensor]], processes: Processes = ALONE
    ) -> None:
        """Choose anew between what is kept and the examples of `batches`, those of all processes.

        Afterwards they may be on the CPU. ValueError, in the name of `owner`, if inputs are not
        alike; nothing is changed then.
        """
        random = copy.deepcopy(self._random)
        with processes.together():
            rows, seen = self._with(owner, batches, random, processes)
        if processes.groups:
            seen = sum(processes.gathered(seen), Counter())
            rows = self._chosen([own for own in processes.gathered_rows(rows) if own], seen)
        self.rows, self._seen, self._random = rows, seen, random

    def follow(self, inputs: Inputs, labels: Tensor) -> None:
        """Take in a batch of a stream, like those before: the choice that `add` makes, in place."""
        keys = torch.randint(_KEYS, (len(labels),), generator=self._random).to(labels.device)
        self._seen[0] += len(labels)
        new, room = (inputs, labels, keys), self.budget - len(self)
        if room > 0:
            self._append(taken(new, slice(room)))
            new = taken(new, slice(room, None))
        if room < len(labels):
            self._replace(new)

    def _append(self, new: tuple[Any, ...]) -> None:
        """Into room for twice as many rows, which few are moved to."""
        count, total = len(self), len(self) + len(new[1])
        columns, rebuild = flatten(new)
        if self._room is None or total > len(self._room[0]):
            size = min(self.budget, 2 * total)
            self._room = [entry.new_empty(size, *entry.shape[1:]) for entry in columns]
            for entry, kept in zip(self._room, flatten(self.rows)[0], strict=False):
                entry[:count] = kept
        for entry, rows in zip(self._room, columns, strict=True):
            entry[count:total] = rows
        self._rows = rebuild([entry[:total] for entry in self._room])

    def _replace(self, new: tuple[Any, ...]) -> None:
        """Where all places are taken, those of the largest keys are given to rows of smaller."""
        kept, keys = self.rows[2], new[2]
        left_out = torch.cat([kept, keys]).topk(len(keys)).indices
        stays = torch.ones_like(keys, dtype=torch.bool)
        stays[left_out[left_out >= len(kept)] - len(kept)] = False
        places, chosen = left_out[left_out < len(kept)], stays.nonzero().flatten()
        for mine, theirs in zip(flatten(self.rows)[0], flatten(new)[0], strict=True):
            mine.index_copy_(0, places, theirs[chosen])

    def _with(
        self,
        owner: str,
        batches: Iterable[tuple[Inputs, Tensor]],
        random: CpuGenerator,
        processes: Processes,
    ) -> tuple[tuple[Any, ...], Counter[int]]:
        """What this process would keep, and what it has seen; the first has all that is kept."""
        has_kept, draws = processes.rank == 0 and bool(self.rows), processes.own_generator(random)
        seen = self._seen.copy() if processes.rank == 0 else Counter[int]()
        pieces, waiting = [self.rows] if has_kept else [], 0
        for inputs, labels in batches:
            for known in (pieces or [self.rows])[0][:1]:
                check_alike(owner, inputs, known, "in the memory")
            if self.policy == "balanced" and (labels.dim() != 1 or labels.is_floating_point()):
                raise ValueError(
                    f'{owner}: policy="balanced" needs a class for each example, and labels are '
                    f'{described(labels)}; take policy="reservoir"'
                )
            keys = torch.randint(_KEYS, (len(labels),), generator=draws).to(labels.device)
            # A loader may use the tensors of a batch again for the next one.
            pieces.append((mapped(Tensor.clone, inputs), labels.clone(), keys))
            seen.update(self._groups(labels).tolist())
            waiting += len(labels)
            if waiting >= self.budget:  # a choice costs a copy of all
                pieces, waiting = [self._chosen(pieces, seen)], 0
        return self._chosen(pieces, seen) if pieces else (), seen

    def _groups(self, labels: Tensor) -> Tensor:
        """Whom each example shares the budget with: its class, or all."""
        is_balanced = self.policy == "balanced"
        return labels if is_balanced else labels.new_zeros(len(labels), dtype=torch.int64)

    def _chosen(self, pieces: list[tuple[Any, ...]], seen: Mapping[int, int]) -> tuple[Any, ...]:
        """Of all these rows those with the smallest keys in each group, in their order."""
        together = concatenated(pieces)
        _, labels, keys = together
        groups = self._groups(labels)
        chosen = []
        for group, share in shares(seen, self.budget).items():
            places = (groups == group).nonzero().flatten()
            chosen.append(places[keys[places].argsort()[:share]])
        places = torch.cat(chosen).sort().values
        chosen_rows: tuple[Any, ...] = taken(together, places)
        return chosen_rows

    def to(self, device: torch.device) -> None:
        """Move the examples."""
        self.rows = mapped(lambda entry: entry.to(device), self.rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the options, as copies."""
        return {
            **dict(zip(_ROWS, mapped(Tensor.clone, self.rows), strict=False)),
            "seen": dict(self._seen),
            "random": self._random.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Take over what `state_dict` returned."""
        names = _ROWS if "inputs" in state else ()
        self.rows = mapped(
            lambda entry: entry.to(device, copy=True), tuple(state[name] for name in names)
        )
        self._seen = Counter(state.get("seen", {}))
        if len(self) > self.budget:  # of a larger one
            self.rows = self._chosen([self.rows], self._seen)
        self._random = restored(self.seed, state.get("random"))


def shares(seen: Mapping[int, int], budget: int) -> dict[int, int]:
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
    kept = {}
    for group in sorted(seen):
        extra = int(seen[group] > level and left > 0)
        kept[group] = min(seen[group], level) + extra
        left -= extra
    return kept
