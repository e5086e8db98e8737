"""The method as an optimizer sees it: what its pass works on, and what is called around the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


class ParameterState(Protocol):
    """Parameters by name, and for each of them one tensor in every list."""

    names: list[str]
    params: list[Tensor]
    lists: dict[str, list[Tensor]]


class Attachment(Protocol):
    """What a method's own calls around a step leave behind."""

    penalty: Tensor | None


@runtime_checkable
class Protector(Protocol):
    """A method of clext, alone or combined.

    With `fused`, its `_state` is a `ParameterState` that has these lists. `_follow_model` brings
    that up to date with a model that has changed.
    """

    model: nn.Module
    steps: int  # of this task that the method had a part in

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def fused(self) -> tuple[str, ...] | None:
        """Names of the state that the pass works on; None: `attach` does what the method does."""

    @property
    def strength(self) -> float: ...  # noqa: D102
    @property
    def constant(self) -> float: ...  # noqa: D102
    @property
    def decay(self) -> float:
        """Weight of the old average of squared gradients, for methods with a "fisher"."""

    def attach(self, optimizer: Optimizer) -> Attachment: ...  # noqa: D102
    def _follow_model(self) -> None: ...
    def _after_step(self) -> None: ...


def state_of(method: Protector | None) -> ParameterState | None:
    """What the pass works on, if that is anything of the method's."""
    if method is None or not method.fused:
        return None
    return cast("ParameterState", cast("Any", method)._state)
