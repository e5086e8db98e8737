"""Bad arguments of an op: one sentence with op, argument, expected and got, and nothing changed.

Lists are checked by one function, so each sentence is tested once for each kind of list.
"""

from __future__ import annotations

import re

import pytest
import torch
from op_arguments import ListArg, Op
from op_registry import OPS
from op_samples import Entry, bits, sample, tensors_of

from clext import ops

THREE = (Entry((2, 3)), Entry((2, 3)), Entry((2, 3)))
# Parameters and gradients, read and written, with state that is read; state that is written; rows.
KINDS = [
    op
    for op in OPS
    if op.name in ("add_quadratic_penalty_grad_", "consolidate_importance_", "sliced_importance_")
]

WITH_ANCHORS = [op for op in KINDS if any(arg.name == "anchors" for arg in op.lists)]

every_kind = pytest.mark.parametrize("op", KINDS, ids=str)


def snapshot(arguments):
    """The bits of every tensor that has any."""
    return {
        name: bits(tensor) if tensor.device.type != "meta" and not tensor.is_sparse else tensor
        for name, tensor in tensors_of(arguments).items()
        if isinstance(tensor, torch.Tensor)
    }


def assert_refused(op, arguments, message, error=ValueError):
    """`message` is a regular expression for what follows the op's name."""
    before = snapshot(arguments)
    with pytest.raises(error) as caught:
        op.kernel(arguments)
    text = str(caught.value)
    assert re.match(f"{op.name}: {message}", text), text
    assert len(text.splitlines()) == 1
    after = snapshot(arguments)
    for name, old in before.items():
        same = after[name] is old or torch.equal(after[name], old)
        assert same, f"the refused call has changed {name}"


def lists_but_the_layout(op: Op) -> list[ListArg]:
    return [arg for arg in op.lists if arg.name != op.layout]


# ----------------------------------------------------------------------------- lists


@every_kind
def test_other_length(op, device):
    for arg in lists_but_the_layout(op):
        arguments = sample(op, THREE, device)
        arguments[arg.name].pop()
        message = rf"{arg.name} has 2 tensors, expected 3 \(as many as {op.layout}\)"
        assert_refused(op, arguments, message)


@every_kind
@pytest.mark.parametrize("shape", [(3, 2), (3,), (1, 3), (3, 1, 3), ()], ids=str)
def test_other_shape(op, shape, device):
    """Shapes are not broadcast."""
    for arg in lists_but_the_layout(op):
        arguments = sample(op, THREE, device)
        arguments[arg.name][2] = arguments[arg.name][2].new_zeros(shape)
        assert_refused(op, arguments, rf"{arg.name}\[2\] has shape .*, expected .*\[2, 3\]")


@every_kind
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bfloat16], ids=str)
def test_other_dtype(op, dtype, device):
    for arg in op.lists:
        if arg.name == "params" and dtype.is_floating_point:
            continue  # then it is the others that do not fit
        if arg.kind == "consolidated" and dtype == torch.bfloat16:
            continue  # which fits, if both are
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].to(dtype)
        message = rf"{arg.name}\[1\] has dtype \S+, expected \S*float"
        assert_refused(op, arguments, message, TypeError)


@every_kind
def test_state_is_float64_for_float64_parameters_alone(op, device):
    for arg in lists_but_the_layout(op):
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].double()
        message = rf"{arg.name}\[1\] has dtype \S*float64, expected \S*float32"
        assert_refused(op, arguments, message, TypeError)


@pytest.mark.parametrize("op", WITH_ANCHORS, ids=str)
def test_anchors_and_importances_are_bfloat16_together_and_not_for_float64(op, device):
    for name in ("anchors", "importances"):
        arguments = sample(op, THREE, device)
        arguments[name][1] = arguments[name][1].bfloat16()
        first, second = (arg.name for arg in op.lists if arg.kind == "consolidated")
        found, expected = "float32", "bfloat16"
        if name == second:
            found, expected = expected, found
        message = rf"{second}\[1\] has dtype {found}, expected {expected} \(.* may both be bfloat16"
        assert_refused(op, arguments, message, TypeError)
    arguments = sample(op, (Entry((2, 3), torch.float64),), device)
    for name in (first, second):
        arguments[name] = [entry.bfloat16() for entry in arguments[name]]
    message = rf"{first}\[0\] has dtype bfloat16, expected float64"
    assert_refused(op, arguments, message, TypeError)


@every_kind
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_other_device(op, device):
    for arg in op.lists:
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].cpu()
        assert_refused(op, arguments, rf"{arg.name}\[1\] is on cpu, expected cuda")


@every_kind
def test_a_mix_with_the_meta_device(op):
    arguments = sample(op, THREE)
    arguments[op.lists[-1].name][1] = arguments[op.lists[-1].name][1].to("meta")
    assert_refused(op, arguments, "there are tensors on cpu and meta, expected one device")


@every_kind
def test_written_lists_in_another_layout(op, device):
    for arg in lists_but_the_layout(op):
        for strides in ((1, 2), (0, 1)):
            arguments = sample(op, THREE, device)
            entry = arguments[arg.name][1]
            arguments[arg.name][1] = entry.new_zeros(6).as_strided((2, 3), strides)
            message = rf"{arg.name}\[1\] has strides .*, expected \[3, 1\] \({op.layout}\[1\]\)"
            if arg.written:
                assert_refused(op, arguments, message)


@every_kind
def test_parameters_with_gaps_or_overlap(op, device):
    arguments = sample(op, THREE, device)
    dense = arguments[op.layout][1]
    for entry, strides in (
        (dense.repeat_interleave(2, dim=1)[:, ::2], r"\[6, 2\]"),
        (dense[:1].expand(2, 3), r"\[0, 1\]"),
    ):
        message = rf"{op.layout}\[1\] of shape \[2, 3\] has strides {strides}, expected a dense"
        arguments[op.layout][1] = entry
        assert_refused(op, arguments, message)


# ----------------------------------------------------------------------------- shared memory


@every_kind
def test_written_lists_share_memory_with_no_other(op, device):
    """A saved copy that is the live tensor would silently turn a method into nothing."""
    for written in op.lists:
        for other in op.lists:
            if not written.written or other.kind == "rows":
                continue
            arguments = sample(op, THREE, device)
            arguments[written.name][2] = arguments[other.name][0]
            first, second = rf"{written.name}\[2\]", rf"{other.name}\[0\]"
            message = rf"({first} shares memory with {second}|{second} shares memory with {first});"
            assert_refused(op, arguments, message)


@every_kind
def test_partly_shared_memory(op, device):
    for written in op.lists:
        for other in op.lists:
            if not written.written or other.kind == "rows" or other is written:
                continue
            arguments = sample(op, THREE, device)
            block = arguments[written.name][1].new_ones(11)
            arguments[written.name][1] = block[:6].view(2, 3)
            arguments[other.name][1] = block[5:].view(2, 3)
            message = rf"{other.name}\[1\] shares memory with {written.name}\[1\]; .*clone"
            assert_refused(op, arguments, message)


def test_rows_share_no_memory_with_what_is_written(device):
    op = next(op for op in OPS if op.name == "sliced_importance_")
    arguments = sample(op, THREE, device)
    arguments["acc"][1] = arguments["jacobian"][2][1]
    assert_refused(op, arguments, r"\w+\[\d\] shares memory with \w+\[\d\];")


@every_kind
def test_neighbours_in_one_block_of_memory_are_fine(op, device):
    arguments = sample(op, THREE, device)
    for arg in op.lists:
        if arg.kind != "rows":
            block = torch.stack(arguments[arg.name])
            arguments[arg.name] = list(block.unbind())
    op.kernel(arguments)


def test_state_made_in_inference_mode_is_refused_before_any_is_changed(device):
    importances, estimate, params = ([torch.ones(3, device=device)] for _ in range(3))
    with torch.inference_mode():
        anchors = [torch.zeros(3, device=device)]
    with pytest.raises(
        ValueError, match=r"anchors\[0\] was made in torch.inference_mode\(\), expected"
    ):
        ops.consolidate_importance_(importances, anchors, estimate, params, 1.0)
    assert torch.equal(importances[0], torch.ones_like(importances[0]))
    assert torch.equal(anchors[0], torch.zeros_like(anchors[0]))


# ----------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("op", [op for op in OPS if op.scalars], ids=str)
def test_numbers_out_of_range(op, device):
    for scalar in op.scalars:
        for value in scalar.invalid:
            arguments = {**sample(op, THREE, device), scalar.name: value}
            message = rf"{scalar.name} is -?[\w.+-]+, expected a (finite )?number( |$)"
            assert_refused(op, arguments, message)
        for value in scalar.edges:
            op.kernel({**sample(op, THREE, device), scalar.name: value})


# ----------------------------------------------------------------------------- single ops


def test_incoming_gradient_of_the_penalty(device):
    theta = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"backward: grad has shape \[1\], expected a 0-dim"):
        ops.quadratic_penalty_backward(theta[:1], [theta], [theta], [theta])


def test_slices(device):
    acc, jacobian = torch.ones(4, device=device), torch.ones(3, 4, device=device)
    for slices, message in (
        (torch.ones(3), r"slices has shape \[3\], expected \[slices, outputs\]"),
        (torch.ones(5, 2), r"jacobian\[0\] has 3 rows, expected 2 \(the columns of slices\)"),
    ):
        with pytest.raises(ValueError, match=f"^sliced_importance_: {message}"):
            ops.sliced_importance_([acc], [jacobian], slices.to(device), 1.0)
    assert torch.equal(acc, torch.ones_like(acc))
    both, rows = [acc, acc.double()], [jacobian, jacobian.double()]
    with pytest.raises(ValueError, match=r"^sliced_importance_: acc mixes float32 and float64"):
        ops.sliced_importance_(both, rows, torch.ones(2, 3, device=device), 1.0)


# ----------------------------------------------------------------------------- other types


@pytest.mark.parametrize("op", [op for op in OPS if not op.fused], ids=str)
def test_something_else_than_tensors(op):
    for arg in op.lists:
        for wrong in (None, 1.0, "x", [1.0]):
            arguments = sample(op, THREE)
            arguments[arg.name][1] = wrong
            got = type(wrong).__name__
            message = rf"{arg.name}\[1\] is of type {got}, expected a tensor$"
            assert_refused(op, arguments, message, TypeError)
        for wrong in (None, 1.0, torch.ones(3, 2, 3)):
            arguments = {**sample(op, THREE), arg.name: wrong}
            message = rf"{arg.name} is of type {type(wrong).__name__}, expected a list of tensors$"
            assert_refused(op, arguments, message, TypeError)
    for scalar in op.scalars:
        arguments = {**sample(op, THREE), scalar.name: None}
        message = f"{scalar.name} is of type NoneType, expected a number$"
        assert_refused(op, arguments, message, TypeError)


def test_something_else_than_a_tensor():
    theta = torch.ones(3)
    with pytest.raises(
        TypeError, match="^project_gradient_: weights is of type NoneType, expected"
    ):
        ops.project_gradient_([theta], [theta[None]], None)
    with pytest.raises(TypeError, match="^per_sample_sum: features is of type NoneType, expected"):
        ops.per_sample_sum(None, None)
