"""Exemplars: the examples of a class whose mean is that of the class, found by herding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

# One entry for each task that had the class: inputs in the order in which herding took them.
Sets = dict[int, list[Tensor]]


def herd(features: Tensor, count: int, *, norm: bool) -> Tensor:
    """The rows whose running mean stays nearest to the mean of all, one after the other.

    Herding (Welling 2009) as in iCaRL (Rebuffi et al. 2017, arXiv:1611.07725, algorithm 4): the
    k-th row is the one for which the mean of the first k is nearest; none is taken twice.

    Args:
        features: [N, size], of length 1 with `norm`.
        count: of rows; N if there are no more.
        norm: the mean is brought to length 1.

    Returns:
        int64 [min(count, N)], on the device, from where nothing is read.
    """
    mean = class_mean(features, norm=norm)
    # With S the sum of what was taken, the distance to k * mean - S decides; of its square the part
    # that all have in common is left out.
    squares = features.square().sum(dim=1)
    lack, taken = torch.zeros_like(mean), []
    for _ in range(min(count, len(features))):
        lack = lack + mean
        place = torch.addmv(squares, features, lack, alpha=-2).argmin().view(1)
        squares = squares.index_fill(0, place, torch.inf)
        lack = lack - features.index_select(0, place).view(-1)
        taken.append(place)
    return torch.cat(taken)


def class_mean(features: Tensor, *, norm: bool) -> Tensor:
    """The mean of the rows, brought to length 1 with `norm`."""
    mean = features.mean(dim=0)
    return F.normalize(mean, dim=0) if norm else mean


def prepared(features: Tensor, *, norm: bool) -> Tensor:
    """Features at least in float32, of length 1 with `norm`."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(features, dim=1) if norm else features


def exemplars_per_set(
    owner: str, sets: Sets, coming: Collection[int], budget: int
) -> dict[int, int]:
    """How many exemplars each set of a class has, once the classes `coming` have got another set.

    The same for each class, and for each task that had it.

    Raises:
        ValueError: the budget has not one for each.
    """
    counts = {label: len(entries) for label, entries in sets.items()}
    for label in coming:
        counts[label] = counts.get(label, 0) + 1
    share = budget // max(len(counts), 1)
    most = max(counts.values(), default=1)
    needed = len(counts) * most
    if share < most:
        tasks = f" in up to {most} tasks" if most > 1 else ""
        raise ValueError(
            f"{owner}: a budget of {budget} is too small for one exemplar of each of the "
            f"{len(counts)} classes{tasks}; make the method with budget={needed} or more"
        )
    return {label: share // count for label, count in counts.items()}


def joined(sets: Sets) -> tuple[Tensor, Tensor] | None:
    """All exemplars and their labels; None where there is none."""
    if not sets:
        return None
    inputs = torch.cat([entry for entries in sets.values() for entry in entries])
    sizes = [sum(map(len, entries)) for entries in sets.values()]
    labels = torch.tensor(list(sets), device=inputs.device)
    return inputs, labels.repeat_interleave(
        torch.tensor(sizes, device=inputs.device), output_size=sum(sizes)
    )


def map_sets(sets: Sets, function: Callable[[Tensor], Tensor]) -> Sets:
    """The same with `function` of each tensor."""
    return {label: [function(entry) for entry in entries] for label, entries in sets.items()}
