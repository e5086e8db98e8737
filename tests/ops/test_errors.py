"""Bad arguments of an op: one sentence with op, argument, expected and got, and nothing changed."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import OPS, Entry, ListArg, Op, bits, sample, tensors_of

from clext import ops, reference

THREE = (Entry((2, 3)), Entry((2, 3)), Entry((2, 3)))

every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_implementation = pytest.mark.parametrize("implementation", ["kernel", "reference"])


def snapshot(arguments):
    """The bits of every tensor that has any."""
    return {
        name: bits(tensor) if tensor.device.type != "meta" and not tensor.is_sparse else tensor
        for name, tensor in tensors_of(arguments).items()
    }


def assert_refused(op, implementation, arguments, message, error=ValueError):
    """`message` is a regular expression for what follows the op's name."""
    before = snapshot(arguments)
    with pytest.raises(error) as caught:
        getattr(op, implementation)(arguments)
    text = str(caught.value)
    assert re.match(f"{op.name}: {message}", text), text
    assert len(text.splitlines()) == 1
    after = snapshot(arguments)
    for name, old in before.items():
        same = after[name] is old or torch.equal(after[name], old)
        assert same, f"the refused call has changed {name}"


def lists_but_the_layout(op: Op) -> list[ListArg]:
    return [arg for arg in op.lists if arg.name != op.layout]


def other_device(device):
    return "cpu" if device == "cuda" else "meta"


# ----------------------------------------------------------------------------- lists


@every_op
@every_implementation
def test_other_length(op, implementation, device):
    for arg in lists_but_the_layout(op):
        arguments = sample(op, THREE, device)
        arguments[arg.name].pop()
        message = rf"{arg.name} has 2 tensors, expected 3 \(as many as {op.layout}\)"
        assert_refused(op, implementation, arguments, message)
    if lists_but_the_layout(op):
        arguments = sample(op, THREE, device)
        arguments[op.layout].append(arguments[op.layout][0].clone())
        assert_refused(op, implementation, arguments, r"\w+ has 3 tensors, expected 4")


@every_op
@every_implementation
def test_other_shape(op, implementation, device):
    for arg in lists_but_the_layout(op):
        for index in (0, 2):
            arguments = sample(op, THREE, device)
            entry = arguments[arg.name][index]
            arguments[arg.name][index] = entry.transpose(-1, -2).contiguous()
            message = rf"{arg.name}\[{index}\] has shape \[(3, )?3, 2\], expected .*\[2, 3\]"
            assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
def test_shapes_are_not_broadcast(op, implementation, device):
    for arg in lists_but_the_layout(op):
        for shape in ((3,), (1, 3), (3, 1, 3), ()):
            arguments = sample(op, THREE, device)
            arguments[arg.name][1] = arguments[arg.name][1].new_zeros(shape)
            message = rf"{arg.name}\[1\] has shape .*, expected .*\[2, 3\]"
            assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_not_real_floats(op, implementation, dtype, device):
    for arg in op.lists:
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].to(dtype)
        message = rf"{arg.name}\[1\] has dtype \S+, expected \S*float"
        assert_refused(op, implementation, arguments, message, TypeError)


@every_op
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_state_of_another_dtype(op, implementation, dtype, device):
    for arg in op.lists:
        decides = arg.name == op.layout and all(other.kind != "parameter" for other in op.lists)
        if arg.kind == "parameter" or (decides and dtype == torch.float64):
            continue
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].to(dtype)
        message = rf"{arg.name}\[1\] has dtype \S+, expected \S*float"
        assert_refused(op, implementation, arguments, message, TypeError)


@every_op
@every_implementation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradients_of_another_dtype(op, implementation, dtype, device):
    if not {"params", "grads"} <= {arg.name for arg in op.lists}:
        pytest.skip("has no parameters beside gradients")
    arguments = sample(op, THREE, device)
    arguments["grads"][1] = arguments["grads"][1].to(dtype)
    message = r"grads\[1\] has dtype \S+, expected \S*float32"
    assert_refused(op, implementation, arguments, message, TypeError)


@every_op
@every_implementation
def test_other_device(op, implementation, device):
    for arg in op.lists:
        arguments = sample(op, THREE, device)
        other = other_device(device)
        arguments[arg.name][1] = arguments[arg.name][1].to(other)
        message = rf"{arg.name}\[1\] is on {other}\S*, expected {device}"
        assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
def test_sparse_tensors(op, implementation, device):
    for arg in op.lists:
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].to_sparse()
        message = rf"{arg.name}\[1\] has layout \S+, expected a dense \(strided\) tensor"
        assert_refused(op, implementation, arguments, message, TypeError)


@every_op
@every_implementation
def test_written_lists_in_another_layout(op, implementation, device):
    for arg in lists_but_the_layout(op):
        if not arg.written:
            continue
        arguments = sample(op, THREE, device)
        arguments[arg.name][1] = arguments[arg.name][1].t().contiguous().t()
        message = rf"{arg.name}\[1\] has strides \[1, 2\], expected \[3, 1\] \({op.layout}\[1\]\)"
        assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
def test_parameters_with_gaps_or_overlap(op, implementation, device):
    arguments = sample(op, THREE, device)
    dense = arguments[op.layout][1]
    for entry, strides in (
        (dense.repeat_interleave(2, dim=1)[:, ::2], r"\[6, 2\]"),
        (dense[:1].expand(2, 3), r"\[0, 1\]"),
    ):
        message = rf"{op.layout}\[1\] of shape \[2, 3\] has strides {strides}, expected a dense"
        arguments[op.layout][1] = entry
        assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
def test_written_lists_that_overlap_themselves(op, implementation, device):
    for arg in op.lists:
        if arg.written:
            arguments = sample(op, THREE, device)
            arguments[arg.name][1] = arguments[arg.name][1][:1].expand(2, 3)
            assert_refused(
                op, implementation, arguments, rf"{arg.name}\[1\] .*has strides \[0, 1\]"
            )


# ----------------------------------------------------------------------------- shared memory


@every_op
@every_implementation
def test_written_lists_share_memory_with_no_other(op, implementation, device):
    """A saved copy that is the live tensor would silently turn a method into nothing."""
    for written in op.lists:
        for other in op.lists:
            if not written.written or other.kind == "rows":
                continue
            arguments = sample(op, THREE, device)
            arguments[written.name][2] = arguments[other.name][0]
            first, second = rf"{written.name}\[2\]", rf"{other.name}\[0\]"
            message = rf"({first} shares memory with {second}|{second} shares memory with {first});"
            assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
def test_partly_shared_memory(op, implementation, device):
    for written in op.lists:
        if not written.written:
            continue
        for other in op.lists:
            if other.kind == "rows" or other is written:
                continue
            arguments = sample(op, THREE, device)
            block = arguments[written.name][1].new_ones(11)
            arguments[written.name][1] = block[:6].view(2, 3)
            arguments[other.name][1] = block[5:].view(2, 3)
            message = rf"{other.name}\[1\] shares memory with {written.name}\[1\]; .*clone"
            assert_refused(op, implementation, arguments, message)


@every_implementation
def test_rows_share_no_memory_with_what_is_written(implementation, device):
    op = next(op for op in OPS if op.name == "sliced_importance_")
    arguments = sample(op, THREE, device)
    arguments["acc"][1] = arguments["jacobian"][2][1]
    assert_refused(op, implementation, arguments, r"\w+\[\d\] shares memory with \w+\[\d\];")


@every_op
@every_implementation
def test_neighbours_in_one_block_of_memory_are_fine(op, implementation, device):
    arguments = sample(op, THREE, device)
    for arg in op.lists:
        if arg.kind != "rows":
            block = torch.stack(arguments[arg.name])
            arguments[arg.name] = list(block.unbind())
    getattr(op, implementation)(arguments)


# ----------------------------------------------------------------------------- numbers


@every_op
@every_implementation
def test_numbers_out_of_range(op, implementation, device):
    for scalar in op.scalars:
        for value in scalar.invalid:
            arguments = {**sample(op, THREE, device), scalar.name: value}
            message = rf"{scalar.name} is -?[\w.+-]+, expected a (finite )?number( |$)"
            assert_refused(op, implementation, arguments, message)


@every_op
@every_implementation
def test_numbers_at_the_edge_of_their_range(op, implementation, device):
    for scalar in op.scalars:
        for value in scalar.edges:
            getattr(op, implementation)({**sample(op, THREE, device), scalar.name: value})


# ----------------------------------------------------------------------------- single ops


@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
def test_incoming_gradient_of_the_penalty(module, device):
    theta = torch.ones(3, device=device)
    with pytest.raises(ValueError, match=r"backward: grad has shape \[1\], expected a 0-dim"):
        module.quadratic_penalty_backward(theta[:1], [theta], [theta], [theta])


@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
def test_slices(module, device):
    acc, jacobian = torch.ones(4, device=device), torch.ones(3, 4, device=device)
    for slices, message in (
        (torch.ones(3), r"slices has shape \[3\], expected \[slices, outputs\]"),
        (torch.ones(5, 2), r"jacobian\[0\] has 3 rows, expected 2 \(the columns of slices\)"),
    ):
        with pytest.raises(ValueError, match=f"^sliced_importance_: {message}"):
            module.sliced_importance_([acc], [jacobian], slices.to(device), 1.0)
    assert torch.equal(acc, torch.ones_like(acc))


@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
def test_slices_of_two_dtypes(module, device):
    acc = [torch.ones(4, device=device), torch.ones(4, device=device, dtype=torch.float64)]
    jacobian = [torch.ones(3, 4, device=device, dtype=entry.dtype) for entry in acc]
    with pytest.raises(ValueError, match=r"^sliced_importance_: acc mixes float32 and float64"):
        module.sliced_importance_(acc, jacobian, torch.ones(2, 3, device=device), 1.0)


@pytest.mark.parametrize("module", [ops, reference], ids=["kernel", "reference"])
def test_state_made_in_inference_mode_is_refused_before_any_is_changed(module, device):
    importances, estimate, params = ([torch.ones(3, device=device)] for _ in range(3))
    with torch.inference_mode():
        anchors = [torch.zeros(3, device=device)]
    with pytest.raises(
        ValueError, match=r"anchors\[0\] was made in torch.inference_mode\(\), expected"
    ):
        module.consolidate_importance_(importances, anchors, estimate, params, 1.0)
    assert torch.equal(importances[0], torch.ones_like(importances[0]))
    assert torch.equal(anchors[0], torch.zeros_like(anchors[0]))


def test_something_else_than_tensors():
    theta = torch.ones(3)
    with pytest.raises((TypeError, RuntimeError), match="quadratic_penalty"):
        ops.quadratic_penalty([theta], [None], [theta])
