"""Every op once, for compute-sanitizer (scripts/gpu_check.sh): small, but with tails, unaligned
starts, rows, all dtypes, several tensors, and some of more than a chunk.
"""

from __future__ import annotations

import pytest
import torch
from op_registry import OPS
from op_samples import DTYPES, Entry, check_against_reference, sample

pytestmark = pytest.mark.sanitize


@pytest.mark.parametrize("op", OPS, ids=str)
def test_kernel(op, device):
    entries = []
    for dtype in DTYPES:
        if dtype == torch.float64 and not op.mixed_dtypes:
            continue
        shapes = [(1,), (0,), (3,), (35, 6), (1025,)]
        # Not in float16: among so many results some are subnormal, with fewer digits than expected.
        large = [] if dtype == torch.float16 else [(65_536 + 9,)]
        entries += [Entry(shape, dtype) for shape in shapes + large]
        entries += [Entry(shape, dtype, "unaligned") for shape in shapes]
        entries += [Entry(shape, dtype, compact=True) for shape in shapes + large]
    check_against_reference(op, sample(op, tuple(entries), device))
