"""Inputs of a model: tensors in tuples, lists, mappings and dataclasses."""

from __future__ import annotations

from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from clext.core.inputs import concatenated, flatten, mapped, one_tensor, rows, split, taken

X = torch.arange(12.0).view(4, 3)
N = torch.tensor(7)  # of all samples
Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Batch:
    a: Any
    b: Any = "text"


NESTINGS = [
    X,
    (X, X + 1),
    [X],
    {"x": X, "n": N, "name": "text"},
    {"x": (X, {"y": X + 1})},
    Pair(X, N),
    Batch(X),
]


@pytest.mark.parametrize("inputs", NESTINGS, ids=lambda inputs: type(inputs).__name__)
def test_a_nesting_is_taken_apart_and_put_together_by_samples(inputs):
    tensors, rebuild = flatten(inputs)
    again = rebuild(tensors)
    assert type(again) is type(inputs)
    assert [a is b for a, b in zip(flatten(again)[0], tensors, strict=True)] == [True] * len(
        tensors
    )
    assert rows(inputs) == 4
    parts = split(inputs, 3)
    assert [rows(part) for part in parts] == [3, 1]
    for joined in (concatenated(parts), concatenated(split(inputs, [1, 0, 3]))):
        for mine, theirs in zip(flatten(joined)[0], tensors, strict=True):
            assert torch.equal(mine, theirs)
    some = taken(inputs, torch.tensor([2, 0]))
    assert torch.equal(flatten(some)[0][0], X[[2, 0]])


def test_what_belongs_to_all_samples_stays():
    made = taken({"x": X, "n": N, "name": "text"}, slice(1))
    assert made["n"] is N
    assert made["name"] == "text"
    assert mapped(torch.neg, {"n": N})["n"] == -7


def test_a_mapping_of_any_kind_becomes_a_dict():
    assert type(mapped(torch.neg, UserDict(x=X))) is dict


def test_rows_that_differ_are_refused():
    for wrong in ((X, X[:1]), {}, "text", N):
        with pytest.raises(
            ValueError, match=r"^inputs are .*, expected tensors with a row for each"
        ):
            rows(wrong)


def test_one_tensor_is_asked_for_by_name():
    assert one_tensor("dgr", X) is X
    with pytest.raises(
        ValueError, match=r"^dgr: inputs are \{x: torch.float32 \[4, 3\]\}, expected"
    ):
        one_tensor("dgr", {"x": X})
