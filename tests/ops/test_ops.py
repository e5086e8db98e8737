"""Every op gives the numbers of its formula; the driver does so for all sizes and layouts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_arguments import INF, NAN, Counts, ListArg, TensorArg, Unused
from op_registry import OPS
from op_samples import (
    DTYPES,
    SIZES,
    Entry,
    assert_same_bits,
    assortment,
    check_against_reference,
    copy,
    outputs_of,
    sample,
    state_dtype,
    tensors_of,
)

from clext import ops, reference

BY_NAME = {str(op): op for op in OPS}
PULL = BY_NAME["add_quadratic_penalty_grad_"]  # reads and writes parameters, reads state, sums
SLICED = BY_NAME["sliced_importance_"]  # takes rows
DISPATCHED = [op for op in OPS if not op.fused]

every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_dispatched_op = pytest.mark.parametrize("op", DISPATCHED, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
reads_and_rows = pytest.mark.parametrize("op", [PULL, SLICED], ids=str)
with_products = pytest.mark.parametrize(
    "op", [SLICED, BY_NAME["gradient_gram"], BY_NAME["project_gradient_"]], ids=str
)
every_implementation = pytest.mark.parametrize("implementation", ["kernel", "reference"])


# ----------------------------------------------------------------------------- the registry


def schemas() -> dict[str, torch.FunctionSchema]:
    found = {schema.name: schema for schema in torch._C._jit_get_all_schemas()}
    return {name[7:]: schema for name, schema in found.items() if name.startswith("clext::")}


def test_every_op_has_an_entry_a_wrapper_and_a_reference():
    # The only op that does not take lists has tests of its own.
    names = {op.name for op in DISPATCHED} | {"per_sample_sum"}
    assert names == set(schemas())
    assert all(hasattr(ops, name) and hasattr(reference, name) for name in names)


@every_dispatched_op
def test_entry_agrees_with_the_schema(op):
    arguments = schemas()[op.name].arguments
    assert [argument.name for argument in arguments] == [arg.name for arg in op.args]
    assert [argument.name for argument in arguments if argument.kwarg_only] == op.keywords
    changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    assert changed == op.written


# ----------------------------------------------------------------------------- values


@every_op
@every_implementation
def test_numbers_worked_out_by_hand(op, implementation, device):
    for example in op.examples:
        arguments = {}
        for arg in op.args:
            value = example.inputs.get(arg.name, getattr(arg, "value", None))
            if isinstance(arg, ListArg | Counts | TensorArg):
                value = torch.tensor(value, dtype=torch.float64, device=device)
            arguments[arg.name] = [value] if isinstance(arg, ListArg | Counts) else value
            if isinstance(arg, Unused):
                arguments[arg.name] = []
        returned = getattr(op, implementation)(arguments)
        outputs = outputs_of(op, arguments, returned)
        expected = {name.split("[")[0]: tensor.tolist() for name, tensor in outputs.items()}
        assert expected == example.outputs


@every_op
def test_dtypes_shapes_and_layouts_mixed_in_one_call(op, device):
    check_against_reference(op, sample(op, assortment(op), device))


@pytest.mark.parametrize(
    ("op", "dtype"),
    [*((PULL, dtype) for dtype in DTYPES), *((op, torch.float32) for op in OPS if op != PULL)],
    ids=str,
)
def test_every_size(op, dtype, device):
    for size in SIZES:
        entries = (Entry((size,), dtype), Entry((size,), dtype, compact=True))
        check_against_reference(op, sample(op, entries, device, seed=size))


@reads_and_rows
def test_many_small_tensors(op, device):
    # More than the table of one kernel launch holds.
    entries = tuple(Entry((i % 7,)) for i in range(1000))
    check_against_reference(op, sample(op, entries, device))


@every_dtype
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "unaligned"])
def test_layout_does_not_matter(dtype, layout, device):
    shapes = [(3, 2, 5, 7), (2, 8, 1, 3)] + ([] if layout == "channels_last" else [(), (6, 35)])
    entries = tuple(Entry(shape, dtype, layout) for shape in shapes)
    check_against_reference(PULL, sample(PULL, entries, device))
    backward = BY_NAME["quadratic_penalty_backward"]
    arguments = sample(backward, entries, device)
    check_against_reference(backward, arguments)
    for grad, like in zip(backward.kernel(arguments), arguments["params"], strict=True):
        assert grad.stride() == like.stride()


@reads_and_rows
@pytest.mark.parametrize(
    "relayed",
    [
        lambda tensor: tensor.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
        lambda tensor: tensor[..., :1, :].expand_as(tensor),
    ],
    ids=["fortran", "strided", "expanded"],
)
def test_read_only_lists_may_have_another_layout(op, relayed, device):
    entries = (Entry((6, 35)), Entry((4, 5, 3), torch.bfloat16), Entry((2, 2)))
    arguments = sample(op, entries, device)
    for arg in op.lists:
        if arg.written or arg.name == op.layout:
            continue
        other = {**copy(arguments), arg.name: [relayed(t) for t in arguments[arg.name]]}
        dense = {**copy(arguments), arg.name: [t.contiguous() for t in other[arg.name]]}
        assert_same_bits(
            outputs_of(op, other, op.kernel(other)), outputs_of(op, dense, op.kernel(dense))
        )


def test_rows_of_a_jacobian_may_lie_apart(device):
    """As in one Jacobian [outputs, all parameters] whose blocks of columns are the list entries."""
    arguments = sample(SLICED, (Entry((6, 35)), Entry((7,))), device)
    apart = copy(arguments)
    flat = torch.cat([rows.flatten(1) for rows in arguments["jacobian"]], dim=1)
    blocks = flat.split([210, 7], dim=1)
    apart["jacobian"] = [blocks[0].view(-1, 6, 35), blocks[1]]
    assert apart["jacobian"][0].stride() == (217, 35, 1)
    expected = outputs_of(SLICED, arguments, SLICED.kernel(arguments))
    assert_same_bits(outputs_of(SLICED, apart, SLICED.kernel(apart)), expected)


@every_dispatched_op
def test_no_tensors_at_all(op, device):
    arguments = sample(op, (), device)
    returned = op.kernel(arguments)
    if op.name == "quadratic_penalty_backward":
        assert returned == []
    elif returned is not None:
        assert returned.item() == 0


def test_read_only_lists_may_share_memory(device):
    theta = torch.randn(10, device=device)
    assert ops.quadratic_penalty([theta], [theta], [theta.abs()]).item() == 0


@every_dtype
def test_a_value_is_the_same_whoever_computes_it(dtype, device):
    """The sum, its share in the fused pass, and the gradients of both."""
    arguments = sample(OPS[0], tuple(Entry((n,), dtype) for n in (5, 1000)), device)
    lists = list(arguments.values())
    value = ops.quadratic_penalty(*lists)
    fused = [torch.zeros_like(theta) for theta in arguments["params"]]
    strengthened = ops.add_quadratic_penalty_grad_(fused, *lists, 1.0)
    alone = ops.quadratic_penalty_backward(torch.ones((), device=device), *lists)
    torch.testing.assert_close(value, strengthened)
    assert all(torch.equal(left, right) for left, right in zip(fused, alone, strict=True))


# ----------------------------------------------------------------------------- NaN and infinity


@pytest.mark.parametrize(
    ("op", "dtype", "poison"),
    [
        *((op, torch.float32, NAN) for op in OPS),
        *((PULL, dtype, poison) for dtype in DTYPES for poison in (INF, -INF)),
    ],
    ids=str,
)
def test_nan_and_infinity_do_not_disappear(op, dtype, poison, device):
    for arg in op.lists:
        # In the second tensor, past the whole lanes of the reduction.
        arguments = sample(op, (Entry((7,), dtype), Entry((21,), dtype)), device)
        arguments[arg.name][1][..., 19] = poison
        outputs = check_against_reference(op, arguments)
        if poison != poison:
            shown = any(tensor.isnan().any() for tensor in outputs.values())
            assert shown == (arg.access != "write"), arg.name


@pytest.mark.parametrize("place", [0, 15, 16, 1023, 1024, 40000])
def test_nan_wins_every_maximum(place, device):
    op = BY_NAME["consolidate_riemannian_walk_"]
    for name in ("fisher", "score"):
        arguments = sample(op, (Entry((3,)), Entry((40001,))), device)
        arguments[name][1][place] = NAN
        op.kernel(arguments)
        assert all(tensor.isnan().all() for tensor in arguments["importances"])


@pytest.mark.parametrize("name", ["accumulate_path_integral_", "riemannian_walk_step_"])
@every_implementation
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_skipped_step_leaves_no_trace_and_a_broken_one_does(name, implementation, value, device):
    """A GradScaler leaves parameters where they are if their gradients are not finite."""
    op = BY_NAME[name]
    arguments = sample(op, (Entry((5, 3)), Entry((1031,), torch.bfloat16)), device)
    for grad, start, theta in zip(
        arguments["task_grads"], arguments["starts"], arguments["params"], strict=True
    ):
        grad.fill_(value)
        start.copy_(theta)
        start[0] += 1
    before = copy(arguments)
    getattr(op, implementation)(arguments)
    for key in op.written:
        for after, old, start, theta in zip(
            arguments[key], before[key], before["starts"], before["params"], strict=True
        ):
            moved = start != theta.to(start.dtype)
            assert 0 < int(moved.sum()) < moved.numel()
            assert torch.equal(after[~moved], old[~moved])
            assert not after[moved].isfinite().any()


# ----------------------------------------------------------------------------- other modes of torch


@every_op
def test_autograd_sees_changes_and_records_nothing(op, device):
    arguments = sample(op, (Entry((5,)), Entry((3,))), device)
    versions = {name: tensor._version for name, tensor in tensors_of(arguments).items()}
    if not op.name.startswith("quadratic_penalty"):  # differentiable: see test_autograd.py
        for name in {"params", "jacobian"} & arguments.keys():
            arguments[name][0].requires_grad_()
    outputs = outputs_of(op, arguments, op.kernel(arguments))
    assert all(tensor.grad_fn is None for tensor in outputs.values())
    if op.fused:  # a plan's state is in no graph, and is not told
        op_written = {"params", "grads"} & set(op.written)
        assert all(t._version > 0 for name in op_written for t in arguments[name])
        return
    for name, tensor in tensors_of(arguments).items():
        assert (tensor._version > versions[name]) == (name.split("[")[0] in op.written), name


@with_products
@every_implementation
def test_autocast_changes_nothing(op, implementation, device):
    arguments = sample(op, (Entry((300,)), Entry((7,), torch.bfloat16)), device)
    under, run = copy(arguments), getattr(op, implementation)
    expected = outputs_of(op, arguments, run(arguments))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(outputs_of(op, under, run(under)), expected)


@reads_and_rows
def test_inference_mode_changes_nothing(op, device):
    arguments = sample(op, (Entry((300,)), Entry((7,), torch.bfloat16)), device)
    expected = outputs_of(op, first := copy(arguments), op.kernel(first))
    with torch.inference_mode():
        made_inside = copy(arguments)
        for under in (made_inside, arguments):
            assert_same_bits(outputs_of(op, under, op.kernel(under)), expected)


# ----------------------------------------------------------------------------- anything else


@st.composite
def any_entries(draw: st.DrawFn) -> tuple[Entry, ...]:
    shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)
    large = st.integers(0, 3000).map(lambda size: (size,))
    entries = []
    for _ in range(draw(st.integers(0, 6))):
        shape = draw(shapes | large)
        layouts = ["contiguous", "transposed", "unaligned"]
        layout = draw(st.sampled_from(layouts + ["channels_last"] * (len(shape) == 4)))
        entries.append(Entry(shape, draw(st.sampled_from(DTYPES)), layout))
    return tuple(entries)


@every_dispatched_op
@given(entries=any_entries(), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None, derandomize=True)
def test_any_lists(op, entries, seed):
    if not op.mixed_dtypes:
        entries = tuple(e for e in entries if state_dtype(e.dtype) == torch.float32)
    check_against_reference(op, sample(op, entries, seed=seed))
