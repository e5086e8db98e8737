"""The method as an optimizer sees it: the state in its pass, and the calls around the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
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
