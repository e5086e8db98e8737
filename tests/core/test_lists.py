"""How lists of tensors lie in memory."""

from __future__ import annotations

import pytest
import torch

from clext.core.lists import is_dense


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(2, 3), True),
        (torch.empty(2, 3).t(), True),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.empty(1, 3).expand(4, 3), False),
        (torch.empty(4)[::2], False),
        (torch.empty(()), True),
        (torch.empty(0, 3)[:, ::2], True),
        (torch.empty(3, 1).as_strided((3, 1), (1, 77)), True),
    ],
)
def test_is_dense(tensor, dense):
    assert is_dense(tensor) == dense
