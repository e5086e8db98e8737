"""The method as an optimizer sees it: the state in its pass, and the calls around the step."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from clext.core.processes import processes_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn
    from torch.optim import Optimizer


class ProtectedState(Protocol):
    """Parameters by name, and for each of them one tensor in every list."""

    names: list[str]
    params: list[Tensor]
    lists: dict[str, list[Tensor]]


class Attached(Protocol):
    """What a method that is called around the step leaves behind."""

    penalty: Tensor | None  # before the last step


@runtime_checkable
class Protector(Protocol):
    """A method of clext, alone or combined.

    `fused` names the state that an optimizer's pass works on: lists of its `_state`, which follows
    the model at `_follow_model`. If it is None, `attach` makes the calls around each step.
    """

    model: nn.Module
    tasks: int  # ended so far
    steps: int  # of this task that the method had a part in

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def fused(self) -> tuple[str, ...] | None: ...  # noqa: D102
    @property
    def strength(self) -> float: ...  # noqa: D102
    @property
    def constant(self) -> float: ...  # noqa: D102
    @property
    def decay(self) -> float: ...  # noqa: D102
    def attach(self, optimizer: Optimizer) -> Attached: ...  # noqa: D102
    def _follow_model(self) -> None: ...
    def _check_unpulled(self, remedy: str) -> None: ...
    def _after_step(self) -> None: ...


def state_of(method: Protector | None) -> ProtectedState | None:
    """What the pass works on, if that is anything of the method's."""
    if method is None or not method.fused:
        return None
    return cast("ProtectedState", cast("Any", method)._state)


def check_whole(owner: str, method: Protector, groups: Sequence[dict[str, Any]]) -> None:
    """ValueError if a path would be followed for a part of the parameters on each process."""
    if "torch.distributed.optim.zero_redundancy_optimizer" not in sys.modules:
        return
    if not method.fused or "path" not in method.fused or not processes_of(method.model).groups:
        return
    own = {entry for group in groups for entry in group["params"]}
    trained = [entry for entry in method.model.parameters() if entry.requires_grad]
    if not own.issuperset(trained):
        raise ValueError(
            f"{owner}: got {len(own)} of {len(trained)} parameters that {method.name} follows, "
            "expected all on each of several processes; where ZeroRedundancyOptimizer makes this "
            "one, leave method= out, and attach() the method to that"
        )


def fingerprint(method: Protector) -> dict[str, Any]:
    """Which method it is and what it has seen, for the state dict of its optimizer."""
    return {"name": method.name, "tasks": method.tasks, "steps": method.steps}


def warn_if_other(owner: str, method: Protector, saved: dict[str, Any]) -> None:
    """Say so if an optimizer's state goes on beside a method that has not seen the same.

    At the first step after loading: in which order the two are loaded does not count.
    """
    now = fingerprint(method)
    if not method.fused:  # its loss, or its pull, has counted this step already
        now["steps"] = min(now["steps"], saved["steps"])
    if now != saved:
        then, here = (
            "{name} after {tasks} tasks and {steps} steps".format(**entry) for entry in (saved, now)
        )
        warnings.warn(
            f"clext: the state of this {owner} was saved beside {then}, and goes on beside {here}; "
            "load the state dict that the method had then, too",
            stacklevel=4,
        )
