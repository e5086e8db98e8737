"""Every op once, for compute-sanitizer (scripts/gpu_check.sh): small, but with tails, unaligned
starts, rows, several tensors, and one tensor of more than a chunk.
"""

from __future__ import annotations

import pytest
import torch
from helpers import DTYPES, OPS, Entry, check_against_reference, sample

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("op", OPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_kernel(op, dtype, device):
    shapes = [(1,), (0,), (3,), (35, 6), (1025,)]
    entries = [Entry(shape, dtype) for shape in shapes]
    entries += [Entry(shape, dtype, "unaligned") for shape in shapes]
    # Not in float16: among so many results some are subnormal, with fewer digits than expected.
    entries.append(Entry((65_536 + 9,), torch.float32 if dtype == torch.float16 else dtype))
    check_against_reference(op, sample(op, tuple(entries), device))
