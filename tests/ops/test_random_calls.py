"""Random calls of all ops against their plain torch in float64: any lists, numbers and threads.

`CLEXT_RANDOM_CALLS=100000 pytest -s tests/ops/test_random_calls.py` makes so many. A call is all
that its seed says, and the calls have the seeds from CLEXT_RANDOM_SEED on: the one that a failure
names is made again, alone, by CLEXT_RANDOM_SEED=... CLEXT_RANDOM_CALLS=1.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from op_arguments import Op
from op_registry import OPS
from op_samples import CHUNK, DTYPES, Entry, check_against_reference, sample

from clext import ops

CALLS = int(os.environ.get("CLEXT_RANDOM_CALLS", "500"))
SEED = int(os.environ.get("CLEXT_RANDOM_SEED", "0"))

RELAID = {
    "as it is": lambda tensor: tensor,
    "from the end": lambda tensor: tensor.movedim(0, -1).contiguous().movedim(-1, 0),
    "with gaps": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
    "one row": lambda tensor: tensor[:1].expand_as(tensor) if tensor.dim() > 1 else tensor,
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_random_calls(threads):
    print(f"{CALLS} random calls, seeds {SEED} to {SEED + CALLS - 1}")
    for seed in range(SEED, SEED + CALLS):
        chance = random.Random(seed)
        torch.set_num_threads(chance.choice((1, 2, 3)))
        op = chance.choice((*OPS, None))
        try:
            if op is None:
                check_per_sample_sum(chance)
            else:
                check_against_reference(op, random_arguments(op, chance))
        except Exception as error:
            error.add_note(f"seed {seed}, {op or 'per_sample_sum'}")
            raise


def random_arguments(op: Op, chance: random.Random):
    arguments = sample(op, random_entries(op, chance), seed=chance.getrandbits(32))
    relay = RELAID[chance.choice(list(RELAID))]
    for arg in op.lists:
        # Only what is read, and gives no shapes, may lie in memory as it likes.
        if not arg.written and arg.name != op.layout and not op.fused:
            tensors = arguments[arg.name]
            arguments[arg.name] = [relay(t) if t.dim() and t.numel() else t for t in tensors]
    for square in arguments.get("exp_avg_sqs", []):
        square += 0.25  # where a gradient cancels, Adam would divide rounding by next to nothing
    for scalar in op.scalars:
        # Near the usual one: at the edges float16 overflows, and float64 beside it does not.
        arguments[scalar.name] *= chance.uniform(0.5, 1.1)
    return arguments


def random_entries(op: Op, chance: random.Random) -> tuple[Entry, ...]:
    entries = []
    for _ in range(chance.choice((int(op.fused), 1, 1, 2, 3, 5, 8))):  # a plan is never empty
        dims = chance.choice((0, 1, 1, 2, 2, 3, 4, 5))
        shape = tuple(chance.randint(0 if chance.random() < 0.1 else 1, 6) for _ in range(dims))
        if dims == 1:
            shape = (chance.choice((shape[0], chance.randint(0, 300))),)
            if chance.random() < 0.01:  # more than a chunk, so that threads share the call
                shape = (CHUNK + chance.randint(-2, CHUNK),)
        layouts = ["contiguous", "transposed", "unaligned"] + ["channels_last"] * (dims == 4)
        dtypes = [d for d in DTYPES if op.mixed_dtypes or d != torch.float64]
        dtype, layout = chance.choice(dtypes), chance.choice(layouts)
        entries.append(Entry(shape, dtype, layout, compact=chance.random() < 0.3))
    return tuple(entries)


def check_per_sample_sum(chance: random.Random) -> None:
    function = chance.choice(("square", "absolute", "identity"))
    samples, groups, inputs, outputs = (chance.choice((1, 2, 3, 5, 17, 40)) for _ in range(4))
    rows = [chance.randint(1, 5) for _ in range(chance.randint(0, 2))]
    torch.manual_seed(chance.getrandbits(32))
    dtype = chance.choice((torch.float32, torch.float64))
    features = torch.randn(samples, groups, inputs, *rows, dtype=torch.float64).to(dtype)
    grads = torch.randn(samples, groups, outputs, *rows, dtype=torch.float64).to(dtype)
    if chance.random() < 0.5:
        features = features.transpose(0, 2).contiguous().transpose(0, 2)
    wide = [t.double().reshape(*t.shape[:3], -1) for t in (features, grads)]
    products = torch.einsum("sgir,sgor->sgio", *wide)
    exact = {"square": products**2, "absolute": products.abs(), "identity": products}[function]
    scale = products.abs().max().item() ** (2 if function == "square" else 1) * samples
    torch.testing.assert_close(
        ops.per_sample_sum(features, grads, function=function).double(), exact.sum(0),
        rtol=0, atol=64 * torch.finfo(dtype).eps * scale,
    )  # fmt: skip
