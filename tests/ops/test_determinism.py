"""The same inputs give the same bits: on any number of threads, in every run, at any address."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_registry import OPS
from op_samples import CHUNK, DTYPES, Entry, assert_same_bits, assortment, copy, outputs_of, sample

from clext import ops

# Without a reduction, with a sum, a maximum, rows, products of pairs, and a step.
KINDS = (
    "accumulate_path_integral_",
    "add_quadratic_penalty_grad_",
    "consolidate_riemannian_walk_",
    "sliced_importance_",
    "gradient_gram",
    "adam_step_ walk",
)

every_op = pytest.mark.parametrize("op", OPS, ids=str)
every_kind = pytest.mark.parametrize("op", [op for op in OPS if str(op) in KINDS], ids=str)


def large(dtype=torch.float32):
    """Enough chunks for any number of threads to share them in many ways, and of unequal sizes."""
    shapes = [(5 * CHUNK + 7,), (3,), (CHUNK // 2, 3), (CHUNK,)]
    return tuple(Entry(shape, dtype) for shape in shapes)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(op, arguments):
    arguments = copy(arguments)
    return outputs_of(op, arguments, op.kernel(arguments))


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_same_bits_on_any_number_of_threads(op, dtype, threads):
    # A sum in float64 shows every change of the order; one in float32 may round it away.
    arguments = sample(op, large(dtype))
    torch.set_num_threads(1)
    expected = run(op, arguments)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert_same_bits(run(op, arguments), expected)


@every_op
def test_same_bits_with_mixed_dtypes_on_any_number_of_threads(op, threads):
    arguments = sample(op, assortment(op))
    torch.set_num_threads(1)
    expected = run(op, arguments)
    torch.set_num_threads(3)
    assert_same_bits(run(op, arguments), expected)


@every_kind
def test_same_bits_in_every_run(op, device):
    arguments = sample(op, large(), device)
    expected = run(op, arguments)
    for _ in range(3):
        assert_same_bits(run(op, arguments), expected)


@every_kind
def test_same_bits_at_any_address(op, device):
    """Vector loads of aligned tensors and plain ones of unaligned tensors see the same numbers."""
    for dtype in DTYPES:
        if dtype == torch.float64 and not op.mixed_dtypes:
            continue
        aligned, unaligned = (
            sample(
                op,
                (
                    Entry((5003,), dtype, layout),
                    Entry((17,), dtype, layout),
                    Entry((5003,), dtype, layout, compact=True),
                ),
                device,
            )
            for layout in ("contiguous", "unaligned")
        )
        assert_same_bits(run(op, unaligned), run(op, aligned))


def test_same_bits_called_from_several_threads_at_once():
    """Dispatcher ops hold no state of their own, and release Python's lock."""
    op = next(op for op in OPS if op.name == "add_quadratic_penalty_grad_")
    arguments = sample(op, large())
    expected = run(op, arguments)
    with ThreadPoolExecutor(4) as pool:
        for outputs in pool.map(lambda _: run(op, arguments), range(16)):
            assert_same_bits(outputs, expected)


def test_many_chunks_are_added_up_exactly(device):
    """A sum in float32 would stop growing at 2^24."""
    size = 2**24 + 2**16
    one = torch.ones(1, device=device).repeat(size)
    assert ops.quadratic_penalty([one], [torch.zeros_like(one)], [one]).item() == size
