"""The combination of two methods on one model: the pull of one, the loss of the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from clext.core.inputs import mapped
from clext.methods.base import Examples, Method

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch.optim import Optimizer

    from clext.core.batches import Batches


def delegated(part: str, name: str) -> Any:  # noqa: ANN401  (of whatever type it is there)
    """The attribute or method `name` of the method that is `part` here."""
    return property(
        lambda self: getattr(getattr(self, part), name),
        lambda self, value: setattr(getattr(self, part), name, value),
    )


class Combined(Method):
    """`Combined(EWC(model), Replay(model))`: what method="ewc+replay" makes.

    Args:
        protector: a method with a penalty or a change of the gradient (EWC, SI, GEM, ...).
        learner: a method of the same model with a loss of its own (Replay, LwF, DGR, ...).

    Raises:
        ValueError: they are not such a pair, or a task of one has begun.
    """

    has_strength = has_penalty = has_own_loss = True

    def __init__(self, protector: Method, learner: Method) -> None:
        for part in (protector, learner):
            if not isinstance(part, Method) or isinstance(part, Combined):
                got = part if isinstance(part, str | type) else type(part)
                raise ValueError(f"Combined: expected two methods of one model, got {got!r}")
        if learner.model is not protector.model:
            raise ValueError(
                f"Combined: {learner.name} was made for another model than {protector.name}; make "
                "both for one"
            )
        if learner.heads.options != protector.heads.options:
            raise ValueError(
                f"Combined: {protector.name} and {learner.name} were made with different forward, "
                "labels, loss or likelihood; give both the same"
            )
        if not protector.has_penalty or not learner.has_own_loss:
            raise ValueError(
                f"Combined: expected a method with a penalty or a change of the gradient (such as "
                f"ewc) and one with a loss of its own (such as replay), got {protector.name} and "
                f"{learner.name}"
            )
        if protector.takes_optimizer:
            raise ValueError(
                f"Combined: {protector.name} takes the optimizer at the end of a task, and "
                f"{learner.name} data; choose another fisher="
            )
        if any(part.tasks or part.heads.blocks for part in (protector, learner)):
            raise ValueError(
                f"Combined: combine {protector.name} and {learner.name} before their first task"
            )
        self.protector, self.learner = protector, learner
        self.model, self.heads = protector.model, protector.heads
        learner.heads = self.heads
        self.name = f"{protector.name}+{learner.name}"  # type: ignore[misc]
        self.fused, self.runs_model = protector.fused, protector.runs_model  # type: ignore[misc]
        self.capturable = protector.capturable and learner.capturable

    @property
    def parts(self) -> tuple[Method, ...]:
        """Protector and learner."""
        return self.protector, self.learner

    @property
    def _weighed(self) -> Method:
        return self.protector if self.protector.has_strength else self.learner

    # The pull, and what an optimizer's pass asks for, is the protector's; the loss the learner's.
    strength = delegated("_weighed", "strength")
    steps = delegated("protector", "steps")
    tasks = delegated("protector", "tasks")
    decay = delegated("protector", "decay")
    constant = delegated("protector", "constant")
    _state = delegated("protector", "_state")
    penalty = delegated("protector", "penalty")
    add_penalty_grad_ = delegated("protector", "add_penalty_grad_")
    _check_unpulled = delegated("protector", "_check_unpulled")
    loss = delegated("learner", "loss")
    _predict = delegated("learner", "_predict")

    def update(self) -> None:
        """Both look at the step."""
        for part in self.parts:
            part.update()

    def consolidate(self, dataloader: Batches | Optimizer | None = None) -> None:
        """End a task for both; if the learner cannot, the protector is put back."""
        if isinstance(dataloader, Iterator):
            # It is read twice, and a loader may use the tensors of a batch again for the next one.
            dataloader = [mapped(Tensor.clone, batch) for batch in dataloader]
        self._follow_model()
        before = self.protector.state_dict()
        self.protector.consolidate(dataloader)
        try:
            self.learner.consolidate(dataloader)
        except BaseException:
            self.protector.load_state_dict(before)
            raise

    def refresh_parameters(self) -> None:
        """Follow a change of the model."""
        for part in self.parts:
            part._follow_model()

    def check_classes(self, tasks: Sequence[Collection[int]]) -> None:
        """ValueError if one of the two cannot learn tasks with these classes."""
        for part in self.parts:
            part.check_classes(tasks)

    def _follow_model(self) -> None:
        self.refresh_parameters()

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        return self.learner._begin_task(self.protector._begin_task(examples))

    def _after_step(self) -> None:
        for part in self.parts:
            part._after_step()

    def state_dict(self) -> dict[str, Any]:
        """The state of the protector, and in its entry "rehearsal" that of the learner."""
        return {**self.protector.state_dict(), "rehearsal": self.learner.state_dict()}

    def _load(self, state: Mapping[str, Any]) -> None:
        for part, given in zip(self.parts, (state, state["rehearsal"]), strict=True):
            part._load(given)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.parts))


Method._combined = Combined
