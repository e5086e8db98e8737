"""The clip of a step: one factor, from the norm of all gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clext.core.lists import widest
from clext.core.sharding import Mesh, gradient_part, number_of_parts, whole

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.no_grad()
def clip_factor(
    groups: Sequence[dict[str, Any]], max_norm: float, scale: Tensor | None
) -> Tensor | None:
    """min(1, max_norm / norm of all gradients); nothing waits for the device.

    Where gradients are sharded over processes, one number is summed over these.
    """
    params = [p for group in groups for p in group["params"] if p.grad is not None]
    grads = [grad for grad in map(gradient_part, params) if grad is not None]
    if not grads:
        return None
    # In float32 (float64): scaled gradients in half precision would overflow.
    found = torch._foreach_norm(grads, 2, dtype=widest(grads))
    norms = [norm.to(grads[0].device) for norm in found]
    if mesh := Mesh(params):
        # In float64: the square of a norm may be out of float32's range.
        pairs = zip(norms, params, strict=True)
        shares = [mesh.share(norm.double().square(), number_of_parts(p)) for norm, p in pairs]
        total = whole(mesh.total(torch.stack(shares).sum())).sqrt().to(norms[0].dtype)
    else:
        total = torch.linalg.vector_norm(torch.stack(norms))
    if scale is not None:
        total = total / scale.to(total.device)
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)
