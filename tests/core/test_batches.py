"""Batches of a task, as they are read from a loader and checked."""

from __future__ import annotations

import re

import pytest
import torch

from clext.core.batches import added_logits, check_alike, check_examples, class_labels, read_batches

CPU = torch.device("cpu")
X, Y = torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)


def read(batches):
    return list(read_batches("EWC", batches, CPU))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "^EWC needs the data of the task: got nothing"),
        (3, r"got int, expected an iterable of batches x or \(x, y\), or of mappings"),
        ([], "the data of the task is empty"),
        ([(X[:0], Y[:0])], "the data of the task is empty"),
        ([{}], "batch 0 is {}, expected tensors with a row for each example"),
        ([X[0, 0]], r"batch 0 is torch.float32 \[\], expected tensors"),
        ([("x", "y")], "batch 0 is tuple of 2 entries, expected tensors"),
        # One batch, not several: its rows, or its inputs and its labels, would be taken for such.
        (X, r"pass \[\(x, y\)\]$"),
        ((X, Y), r"pass \[\(x, y\)\]$"),
        ([Y, X], r"pass \[\(x, y\)\]$"),
        ((Y[:, None], Y), r"pass \[\(x, y\)\]$"),
        ({"x": X, "labels": Y}, r"pass \[\(x, y\)\]$"),
    ],
)
def test_what_is_no_loader_is_refused(batches, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(batches)
    assert "\n" not in str(caught.value)


def test_batches_are_read_in_their_order_without_empty_ones():
    (x, y), [again, _], rest = read(iter([(X, Y), (X[:0], Y[:0]), [X + 1, Y], {"x": X}]))
    assert x is X
    assert y is Y
    assert torch.equal(again, X + 1)
    assert rest["x"] is X
    assert len(read([X, X])) == 2


def test_inference_tensors_can_be_saved_by_a_graph():
    with torch.inference_mode():
        batch = X + 1, Y + 1
    weight = torch.ones(6, requires_grad=True)
    ((x, y),) = read([batch])
    (x @ weight * y).sum().backward()
    assert torch.equal(weight.grad, x.sum(0))


def test_classes_become_int64_without_a_look_at_their_values():
    """That would wait for the device; labels on "meta" have none."""
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64):
        labels = class_labels("loss", Y.to(dtype), 2)
        assert labels.dtype == torch.int64
        assert torch.equal(labels, Y)
    assert class_labels("loss", Y.to("meta"), 2).shape == (2,)
    assert torch.equal(class_labels("loss", Y - 5, 2), Y - 5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (Y[:1], r"labels y are torch.int64 \[1\], expected integers \[2\]"),
        (Y[:, None], r"labels y are torch.int64 \[2, 1\], .*y.squeeze\(1\)"),
        (Y > 0, r"labels y are torch.bool \[2\], .*y.long\(\)"),
        (X, r"labels y are torch.float32 \[2, 6\], .*y.argmax\(dim=1\)"),
        (Y + 3, "labels reach from 3 to 3, expected 0 to 2: they count from the first active"),
        (Y - 1, "labels reach from -1 to -1, expected 0 to 2"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(ValueError, match=f"^loss: {message}"):
        class_labels("loss", labels, 2, range(3))


def test_what_begin_task_adds_is_told_from_what_else_a_batch_has():
    assert added_logits(2, (X,)) is X
    for more in ((), (Y,), ("task 3",), (X[:, 0],)):
        assert added_logits(2, more) is None
    with pytest.raises(ValueError, match=r"argument 3 is torch.float32 \[1, 6\], expected 2 rows"):
        added_logits(2, (X[:1],))


# ------------------------------------------------------------------ of a whole task


def test_examples_of_a_task():
    check_examples("joint", (X, Y))
    check_examples("joint", [X, Y.double()])
    check_examples("joint", (X, Y + 2), range(2, 4))
    with pytest.raises(ValueError, match="labels reach from 0 to 0, expected 2 to 3"):
        check_examples("joint", (X, Y), range(2, 4))
    for wrong in (None, X, [(X, Y)], {"x": X, "y": Y}, (X, Y[:1]), (X[:0], Y[:0]), (X, Y, Y)):
        with pytest.raises(ValueError, match="^joint: examples are .* a pair of te"):
            check_examples("joint", wrong)


def test_inputs_of_another_kind_than_those_known():
    check_alike("GEM", X, X[:1], "in the memory")
    check_alike("GEM", X, X.double(), "in the memory", types=False)
    for other in (X.double(), X[:, :3]):
        message = re.escape(f"GEM: inputs are {other.dtype} {[*other.shape[1:]]} each, expected ")
        with pytest.raises(
            ValueError, match=f"^{message}.* as those in the memory; what differs in length"
        ):
            check_alike("GEM", other, X, "in the memory")
