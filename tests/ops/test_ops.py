"""Every op gives the numbers of its formula, for all dtypes, sizes and layouts it accepts."""

from __future__ import annotations

import pytest
import torch
from helpers import (
    DTYPES,
    INF,
    NAN,
    OPS,
    SIZES,
    Counts,
    Entry,
    ListArg,
    TensorArg,
    Unused,
    assert_same_bits,
    assortment,
    check_against_reference,
    copy,
    outputs_of,
    sample,
    state_dtype,
    tensors_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from clext import ops, reference

every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


# ----------------------------------------------------------------------------- the registry


def schemas() -> dict[str, torch.FunctionSchema]:
    found = {schema.name: schema for schema in torch._C._jit_get_all_schemas()}
    return {name[7:]: schema for name, schema in found.items() if name.startswith("clext::")}


def test_every_op_has_an_entry_a_wrapper_and_a_reference():
    # The only op that does not take lists has tests of its own.
    names = {op.name for op in OPS} | {"per_sample_sum"}
    assert names == set(schemas())
    assert all(hasattr(ops, name) and hasattr(reference, name) for name in names)


@every_op
def test_entry_agrees_with_the_schema(op):
    arguments = schemas()[op.name].arguments
    assert [argument.name for argument in arguments] == [arg.name for arg in op.args]
    assert [argument.name for argument in arguments if argument.kwarg_only] == op.keywords
    changed = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    mutable = [arg.name for arg in op.args if getattr(arg, "mutable", False)]
    assert set(changed) == {*op.written, *mutable}


# ----------------------------------------------------------------------------- values


@every_op
@pytest.mark.parametrize("implementation", ["kernel", "reference"])
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
@every_dtype
def test_every_size(op, dtype, device):
    for size in SIZES:
        check_against_reference(op, sample(op, (Entry((size,), dtype),), device, seed=size))


@every_op
def test_dtypes_shapes_and_layouts_mixed_in_one_call(op, device):
    check_against_reference(op, sample(op, assortment(op), device))


@every_op
def test_many_small_tensors(op, device):
    # More than the table of one kernel launch holds.
    entries = tuple(Entry((i % 7,)) for i in range(1000))
    check_against_reference(op, sample(op, entries, device))


@every_op
@every_dtype
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "unaligned"])
def test_layout_does_not_matter(op, dtype, layout, device):
    shapes = [(3, 2, 5, 7), (2, 8, 1, 3)] + ([] if layout == "channels_last" else [(), (6, 35)])
    entries = tuple(Entry(shape, dtype, layout) for shape in shapes)
    outputs = check_against_reference(op, sample(op, entries, device))
    for name, tensor in outputs.items():
        like = sample(op, entries, device)[op.layout]
        counts = tensor.dim() == 0 and name.startswith("steps")
        if "[" in name and not counts:  # what is returned as a list is laid out like its parameter
            assert tensor.stride() == like[int(name[:-1].split("[")[1])].stride()


@every_op
def test_read_only_lists_may_have_another_layout(op, device):
    entries = (Entry((6, 35)), Entry((4, 5, 3), torch.bfloat16), Entry((2, 2)))
    arguments = sample(op, entries, device)
    expected = outputs_of(op, first := copy(arguments), op.kernel(first))
    for arg in op.lists:
        if arg.written or arg.name == op.layout:
            continue
        for relayed in (_fortran_order, _every_second_element):
            other = {**copy(arguments), arg.name: [relayed(t) for t in arguments[arg.name]]}
            assert_same_bits(outputs_of(op, other, op.kernel(other)), expected)


def _fortran_order(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def _every_second_element(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


@every_op
def test_read_only_lists_may_be_expanded(op, device):
    arguments = sample(op, (Entry((6, 35)),), device)
    for arg in op.lists:
        if arg.written or arg.name == op.layout:
            continue
        row = arguments[arg.name][0][..., :1, :]
        expanded = {**copy(arguments), arg.name: [row.expand_as(arguments[arg.name][0])]}
        dense = {**copy(arguments), arg.name: [expanded[arg.name][0].contiguous()]}
        assert_same_bits(
            outputs_of(op, expanded, op.kernel(expanded)), outputs_of(op, dense, op.kernel(dense))
        )


def test_rows_of_a_jacobian_may_lie_apart(device):
    """As in one Jacobian [outputs, all parameters] whose blocks of columns are the list entries."""
    op = next(op for op in OPS if op.name == "sliced_importance_")
    arguments = sample(op, (Entry((6, 35)), Entry((7,))), device)
    apart = copy(arguments)
    flat = torch.cat([rows.flatten(1) for rows in arguments["jacobian"]], dim=1)
    blocks = flat.split([210, 7], dim=1)
    apart["jacobian"] = [blocks[0].view(-1, 6, 35), blocks[1]]
    assert apart["jacobian"][0].stride() == (217, 35, 1)
    expected = outputs_of(op, arguments, op.kernel(arguments))
    assert_same_bits(outputs_of(op, apart, op.kernel(apart)), expected)


@every_op
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


def test_nothing_important_costs_nothing(device):
    theta, zero = torch.randn(10, device=device), torch.zeros(10, device=device)
    grad = torch.randn(10, device=device)
    before = grad.clone()
    assert ops.add_quadratic_penalty_grad_([grad], [theta], [zero], [zero], 3.0).item() == 0
    assert torch.equal(grad, before)


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


@every_op
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@every_dtype
def test_nan_and_infinity_do_not_disappear(op, poison, dtype, device):
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
    op = next(op for op in OPS if op.name == "consolidate_riemannian_walk_")
    for name in ("fisher", "score"):
        arguments = sample(op, (Entry((3,)), Entry((40001,))), device)
        arguments[name][1][place] = NAN
        op.kernel(arguments)
        assert all(tensor.isnan().all() for tensor in arguments["importances"])


# ----------------------------------------------------------------------------- other modes of torch


@every_op
def test_nothing_is_recorded_for_autograd(op, device):
    if op.name.startswith("quadratic_penalty"):
        pytest.skip("differentiable: see test_autograd.py")
    arguments = sample(op, (Entry((5,)),), device)
    for name in {"params", "jacobian"} & arguments.keys():
        arguments[name][0].requires_grad_()
    outputs = outputs_of(op, arguments, op.kernel(arguments))
    for name, tensor in outputs.items():
        assert tensor.grad_fn is None
        assert tensor.requires_grad == (name == "params[0]")


@every_op
def test_autograd_is_told_what_has_changed(op, device):
    arguments = sample(op, (Entry((5,)), Entry((3,))), device)
    versions = {name: tensor._version for name, tensor in tensors_of(arguments).items()}
    op.kernel(arguments)
    for name, tensor in tensors_of(arguments).items():
        assert (tensor._version > versions[name]) == (name.split("[")[0] in op.written), name


@every_op
@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_autocast_changes_nothing(op, implementation, device):
    arguments = sample(op, (Entry((300,)), Entry((7,), torch.bfloat16)), device)
    under, run = copy(arguments), getattr(op, implementation)
    expected = outputs_of(op, arguments, run(arguments))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(outputs_of(op, under, run(under)), expected)


@every_op
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


@every_op
@given(entries=any_entries(), seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_lists(op, entries, seed):
    if not op.mixed_dtypes:
        entries = tuple(e for e in entries if state_dtype(e.dtype) == torch.float32)
    check_against_reference(op, sample(op, entries, seed=seed))
