"""One task of a sequence: its data, and the model's outputs that are its classes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from clext.data.datasets import Split

Transform = Callable[[Split], Split]


def identity(split: Split) -> Split:
    """The transform of a task that has data of its own."""
    return split


@dataclass(frozen=True, repr=False)
class Task:
    """One task: its name, its data, and the model's outputs that are its classes.

    `transform` makes of the stored splits what the task is about, when it is asked for: a hundred
    permutations of one data set take the memory of one. Labels are then global: they count from the
    model's first output.
    """

    name: str
    outputs: range
    stored_train: Split
    stored_test: Split
    transform: Transform = identity

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

    def train(self) -> Split:
        """Training examples: inputs [N, ...] and global labels [N] int64."""
        return self.transform(self.stored_train)

    def test(self) -> Split:
        """Test examples, likewise."""
        return self.transform(self.stored_test)
