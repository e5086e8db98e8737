"""Batches of a task, as they are read from a loader and checked."""

from __future__ import annotations

import math
import re

import pytest
import torch

from clext.core.batches import (
    check_alike,
    check_examples,
    checked_batch,
    class_labels,
    read_batches,
    read_examples,
    read_inputs,
)

CPU = torch.device("cpu")
X, Y = torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64)
TEN = range(10)


def read(batches):
    return list(read_batches("EWC", batches, CPU))


def examples(batches, classes=TEN, start=0):
    return list(read_examples("Replay", batches, CPU, lambda _: classes, start))


def assert_refused(function, given, message):
    with pytest.raises(ValueError, match=message) as caught:
        function(given)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ from a loader


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "^EWC needs the data of the task: got nothing"),
        (3, r"got int, expected an iterable of batches \(x, y\)"),
        ([], "the data of the task is empty"),
        ([(X[:0], Y[:0])], "the data of the task is empty"),
        ([X], r"batch 0 is torch.float32 \[2, 6\], expected a pair \(x, y\)"),
        ((X, Y), r"where there is a single batch, pass \[\(x, y\)\]$"),
        ([(X, Y), (X, Y, Y)], "batch 1 is tuple of 3 entries"),
        ([{"x": X, "y": Y}], "batch 0 is dict, expected"),
        ([(X, [0, 1])], "y of batch 0 is list of 2 entries, expected a tensor"),
        ([(X, Y[0])], r"y of batch 0 is torch.int64 \[\], expected a tensor"),
        ([(X, Y[:1])], "batch 0 has 2 inputs but 1 labels"),
    ],
)
def test_batches_that_are_no_pairs_are_refused(batches, message):
    assert_refused(read, batches, message)


def test_batches_are_read_in_their_order_without_empty_ones():
    (x, y), (again, _) = read(iter([(X, Y), (X[:0], Y[:0]), [X + 1, Y]]))
    assert x is X
    assert y is Y
    assert torch.equal(again, X + 1)


def test_inputs_are_read_whatever_comes_with_them():
    for batch in (X, (X,), [X, None], (X, Y), (X, Y, "task 3"), (X, "?", 3)):
        assert [x is X for x in read_inputs("MAS", [batch], CPU)] == [True]


@pytest.mark.parametrize("batches", [X, (X, Y), [X, Y], (Y, X), (Y[:, None], Y)])
def test_one_batch_is_not_taken_for_several(batches):
    """Its rows, or its inputs and its labels, would be."""
    message = r"expected an iterable of batches x or \(x, y\); .*pass \[\(x, y\)\]$"
    assert_refused(lambda given: list(read_inputs("MAS", given, CPU)), batches, message)
    assert len(list(read_inputs("MAS", [X, X], CPU))) == 2


@pytest.mark.parametrize("batches", [[{}], [()], [("x", "y")], [X[0, 0]]])
def test_inputs_that_are_no_tensor_are_refused(batches):
    assert_refused(
        lambda given: list(read_inputs("MAS", given, CPU)), batches, "^MAS: x of batch 0 is "
    )


def test_inference_tensors_can_be_saved_by_a_graph():
    with torch.inference_mode():
        batch = X + 1, Y + 1
    weight = torch.ones(6, requires_grad=True)
    ((x, y),) = read([batch])
    (x @ weight * y).sum().backward()
    assert torch.equal(weight.grad, x.sum(0))


def test_examples_have_global_labels_and_no_graph():
    x = X.clone().requires_grad_()
    ((inputs, labels),) = examples([(x, Y.to(torch.uint8) + 1)], range(1, 3), start=4)
    assert not inputs.requires_grad
    assert labels.dtype == torch.int64
    assert labels.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X * math.nan, Y), "^Replay: inputs hold NaN or infinity"),
        ((X, Y + 3), "labels reach from 3 to 3, expected 0 to 2: they count from the first active"),
        ((X, Y - 1), "labels reach from -1 to -1, expected 0 to 2"),
        ((X, Y.double()), r"labels y are torch.float64 \[2\], expected integers \[2\]"),
    ],
)
def test_examples_that_cannot_be_kept_are_refused(batch, message):
    assert_refused(lambda given: examples([given], range(3)), batch, message)


def test_classes_are_asked_for_once_with_the_first_inputs():
    asked = []
    found = read_examples("Replay", [(X, Y), (X + 1, Y)], CPU, lambda x: asked.append(x) or TEN)
    assert len(list(found)) == 2
    assert len(asked) == 1
    assert torch.equal(asked[0], X)


# ------------------------------------------------------------------ for a loss


def test_a_batch_gets_int64_labels_and_keeps_what_comes_with_them():
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.int64):
        inputs, labels, more = checked_batch((X, Y.to(dtype), X[:, 0]))
        assert inputs is X
        assert labels.dtype == torch.int64
        assert torch.equal(labels, Y)
        assert more.shape == (2,)


@pytest.mark.parametrize(
    ("batch", "kind", "message"),
    [
        ((X,), TypeError, r"got 1 arguments, .*loss\(x, y\)"),
        (({"x": X}, Y), TypeError, "inputs x are dict, .* of a module"),
        ((X[0, 0], Y), TypeError, r"inputs x are torch.float32 \[\], expected a tensor with a row"),
        ((X, [0, 1]), TypeError, r"labels y are list of 2 entries, .*torch.as_tensor\(y\)"),
        ((X[:0], Y[:0]), ValueError, r"inputs x are torch.float32 \[0, 6\], .*at least one"),
        ((X, Y[:1]), ValueError, r"labels y are torch.int64 \[1\], expected integers \[2\]"),
        ((X, Y[:, None]), ValueError, r"labels y are torch.int64 \[2, 1\], .*y.squeeze\(1\)"),
        ((X, Y > 0), ValueError, r"labels y are torch.bool \[2\], .*y.long\(\)"),
        ((X, X), ValueError, r"labels y are torch.float32 \[2, 6\], .*y.argmax\(dim=1\)"),
        ((X, Y, X[:1]), ValueError, r"argument 3 is torch.float32 \[1, 6\], expected 2 rows"),
    ],
)
def test_a_batch_that_no_loss_can_take_is_refused(batch, kind, message):
    with pytest.raises(kind, match=f"^loss: {message}") as caught:
        checked_batch(batch)
    assert "\n" not in str(caught.value)


def test_no_value_is_read_before_a_loss():
    """That would wait for the device; labels on "meta" have none."""
    _, labels = checked_batch((X.to("meta"), Y.to("meta")))
    assert labels.shape == (2,)
    assert torch.equal(class_labels("loss", Y - 5, 2), Y - 5)


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
        with pytest.raises(ValueError, match=f"^{message}.* as those in the memory$"):
            check_alike("GEM", other, X, "in the memory")
