"""One task of a sequence: its data, and the model's outputs that are its classes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from clext.core.seeding import generator
from clext.data.datasets import Split, as_numbers

Transform = Callable[[Split], Split]


def identity(split: Split) -> Split:
    """The transform of a task that has data of its own."""
    return split


class Examples(TensorDataset):
    """Examples of which a loader takes the rows of a batch at once."""

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        batch: tuple[Tensor, ...] = self[rows]
        return batch


def as_it_is(batch: Any) -> Any:  # noqa: ANN401  (a loader's word for it is list)
    """The batch, which was taken at once."""
    return batch


@dataclass(frozen=True, repr=False)
class Task:
    """One task: its name, its data, and the model's outputs that are its classes.

    `transform` makes of the stored splits what the task is about, when it is asked for: a hundred
    permutations of one data set take the memory of one. Stored bytes are pixels, and become numbers
    in [0, 1] after it, as `dtype` (by default float32). Labels are global: they count from the
    model's first output.
    """

    name: str
    outputs: range
    stored_train: Split
    stored_test: Split
    transform: Transform = identity
    dtype: torch.dtype | None = None

    def __repr__(self) -> str:
        train, test = len(self.stored_train.labels), len(self.stored_test.labels)
        outputs = f"outputs {self.outputs.start} to {self.outputs.stop - 1}"
        return f"Task {self.name!r}: {train} training and {test} test examples, {outputs}"

    @property
    def classes(self) -> Collection[int]:
        """Its classes by their outputs; all of these where only the transform could tell which."""
        if self.transform is identity:
            found: list[int] = self.stored_train.labels.unique().tolist()
            return found
        return self.outputs

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.stored_train.inputs.shape[1:])

    def to(self, device: torch.device, dtype: torch.dtype, moved: dict[int, Split]) -> Task:
        """The same task on `device`, its inputs as `dtype`.

        `moved`: the splits that are there already, by the identity of what they were.
        """

        def move(stored: Split) -> Split:
            if id(stored) not in moved:
                kept = dtype if stored.inputs.is_floating_point() else stored.inputs.dtype
                moved[id(stored)] = stored.to(device, kept)
            return moved[id(stored)]

        train, test = move(self.stored_train), move(self.stored_test)
        return replace(self, stored_train=train, stored_test=test, dtype=dtype)

    def train(self) -> Split:
        """Training examples: inputs [N, ...] and global labels [N] int64."""
        return self._examples(self.stored_train)

    def test(self) -> Split:
        """Test examples, likewise."""
        return self._examples(self.stored_test)

    def _examples(self, stored: Split) -> Split:
        inputs, labels = self.transform(stored)
        return Split(as_numbers(inputs, self.dtype), labels)

    def train_loader(
        self, batch_size: int, *, shuffle: bool = True, seed: int = 0
    ) -> DataLoader[tuple[Tensor, ...]]:
        """Training examples for a loop of one's own: batches (inputs [B, ...], labels [B]).

        Labels are global: where each task has a head of its own, subtract `outputs.start`.

        Args:
            batch_size: examples in a batch; the last one of a pass may be smaller.
            shuffle: in another order in each pass, drawn from `seed`; False: as stored.
            seed: of the orders.
        """
        data = Examples(*self.train())
        return DataLoader(
            data, batch_size, shuffle=shuffle, generator=generator(seed), collate_fn=as_it_is
        )

    def test_loader(self, batch_size: int = 1000) -> DataLoader[tuple[Tensor, ...]]:
        """Test examples likewise, as stored."""
        return DataLoader(Examples(*self.test()), batch_size, collate_fn=as_it_is)
