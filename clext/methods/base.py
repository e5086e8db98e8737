"""What every method is: a penalty on the loss, a look at each step, and an end of the task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import compress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext import ops
from clext.methods import watch
from clext.methods.clipping import check_clipping, clip_grads_
from clext.methods.learning import Learning
from clext.methods.omissions import End, keep_end, warn_of_omissions
from clext.methods.stateful import option_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clext.importance.passes import Batches

__all__ = ["Method", "option_names"]

# What the pass of an optimizer can work on.
_FUSED_STATES = (
    (),
    ("anchor", "importance"),
    ("anchor", "importance", "path"),
    ("anchor", "importance", "path", "fisher"),
)
_PULLS = ("penalty", "add_penalty_grad_")
_REPLACED_BY_A_STEP = (*_PULLS, "update")


class Method(Learning):
    """A continual-learning method on one model; subclasses are the methods.

    The training loop is the same for all of them::

        method.begin_task()             # where methods shall learn otherwise, see `begin_task`
        ...
        loss = method.loss(x, y)        # or a loss of your own, for methods that only protect
        loss.backward()
        method.add_penalty_grad_()      # or, before backward: loss = loss + method.penalty()
        optimizer.step()
        method.update()
        optimizer.zero_grad()
        ...
        method.consolidate(dataloader)  # at the end of each task

    or, in the one pass that updates the parameters, with an optimizer of `clext.optim` that has the
    method: `optimizer.step()` then does what `add_penalty_grad_` and `update` do.

    The penalty is strength * sum of importance * (parameter - anchor)^2, and zero until the first
    task has ended. The order within a step is: all backward passes (of an accumulation, say),
    `scaler.unscale_(optimizer)` if there is a GradScaler, `add_penalty_grad_`, `clip_grad_norm_` of
    the method, the step, `update`. Call `refresh_parameters` when the model has changed.

    A subclass names its state in `state_names` (for each parameter one tensor per name) and its
    counters in `counter_names`, keeps each option in an attribute of the same name, and implements
    `_end_task`; `update` and the penalty may be overridden. `fused_state` names the state that an
    optimizer's pass works on: nothing, anchor and importance (the pull), path too (the path
    integral), or fisher too (its moving average); None means that the pass cannot do what the
    method does, and is what a subclass gets that overrides `penalty`, `add_penalty_grad_` or
    `update` without saying otherwise: optimizers then call these. `separate_state` names what is
    not needed where an optimizer does the work. An option that changes which state is kept, or what
    a pass can do, sets these names on the instance before `super().__init__`.

    Args:
        model: the trainable parameters of this model are protected; frozen ones are not touched.
        strength: weight of the penalty, >= 0; may be changed at any time.

    Raises:
        ValueError: strength or another option is out of range, the model has no trainable
            parameter, or one that no state can be kept for (see `trainable_parameters`).
    """

    fused_state: tuple[str, ...] | None = None
    # Whether a penalty or a change of the gradient keeps what was learned before, and nothing else
    # does. A subclass with a `penalty` or `add_penalty_grad_` of its own has to say so again.
    keeps_by_pull: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401  (whatever other bases take)
        super().__init_subclass__(**options)
        # Overridden since fused_state was said: then it does not hold for this class.
        owner = next(base for base in cls.__mro__ if "fused_state" in base.__dict__)
        if any(getattr(cls, name) is not getattr(owner, name) for name in _REPLACED_BY_A_STEP):
            cls.fused_state = None
        owner = next(base for base in cls.__mro__ if "keeps_by_pull" in base.__dict__)
        if any(getattr(cls, name) is not getattr(owner, name) for name in _PULLS):
            cls.keeps_by_pull = False  # for all that is known: it need not call the base's
        # A penalty of its own has a gradient of its own, whoever defined the fused one.
        definitions = (
            next(place for place, base in enumerate(cls.__mro__) if name in base.__dict__)
            for name in _PULLS
        )
        if next(definitions) < next(definitions) and cls.fused_state is None:
            cls.add_penalty_grad_ = Method._add_penalty_grad_by_autograd_  # type: ignore[method-assign]

    def __init__(self, model: nn.Module, *, strength: float | None = None) -> None:
        super().__init__(model, strength=strength)
        # What the gradients in `.grad` were multiplied with since the last step, on their device.
        self._task_scale: Tensor | None = None
        self._pull_scale: Tensor | None = None

    # ------------------------------------------------------------------ in the loop

    def penalty(self) -> Tensor:
        """The penalty, strength included: 0-dim, differentiable, to be added to the loss.

        Frozen parameters without a gradient have no part in it, here and in `add_penalty_grad_`. A
        method with a path integral (SI, RWalk) takes its gradient out of `.grad` again after the
        step: clip with the method's `clip_grad_norm_`, not with torch's.
        """
        self._note_pull()
        state = self._state
        lists = [state.params, state.lists["anchor"], state.lists["importance"]]
        if not all(entry.requires_grad for entry in state.params):
            moving = [entry.requires_grad or entry.grad is not None for entry in state.params]
            lists = [list(compress(entries, moving)) for entries in lists]
        try:
            value = self.strength * ops.quadratic_penalty(*lists)
        except (TypeError, ValueError) as error:
            raise self._explained(error) from None
        if self._attached and value.requires_grad:
            value.register_hook(self._warn_of_a_second_pull)
        return value

    def add_penalty_grad_(self) -> Tensor:
        """Add the penalty's gradient to `.grad` in one pass and return the penalty (0-dim).

        Call it after the last `loss.backward()`; it replaces `penalty()` in the loss. A method with
        a path integral (SI, RWalk) takes this gradient out of `.grad` again after the step, so from
        here to the step only its own `clip_grad_norm_` may change the gradients. Gradients that
        were clipped before, by a function of torch, are the task's gradients to the path integral.

        Raises:
            RuntimeError: from the optimizer's step, before anything moves, if the gradients were
                changed after this call (for methods with a path integral).
        """
        self._refuse_if_attached("add_penalty_grad_")
        self._note_pull()
        self._forget_old_scales()
        try:
            value = self._state.plan.add_quadratic_penalty_grad_(self._strength)
        except (TypeError, ValueError) as error:
            raise self._explained(error) from None
        if "path" in self._state.lists:
            watch.leave_stamp(self)
            self._pull_scale = None
            if self._task_scale is not None:
                watch.mark_clipped(self)
        return value

    def _add_penalty_grad_by_autograd_(self) -> Tensor:
        """What `add_penalty_grad_` is where only `penalty` was overridden."""
        with torch.enable_grad():
            value = self.penalty()
        if value.requires_grad:
            value.backward()
        return value.detach()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Clip as `torch.nn.utils.clip_grad_norm_` does; returns the total norm before it (0-dim).

        A method with a path integral (SI, RWalk) keeps what it clipped with, on the device, for the
        next step: the path integral is then the one of the task's gradient before the clipping,
        over the movement that the clipped gradient caused. Call it where the gradients are
        complete: after the last backward pass, after `add_penalty_grad_` (whose gradient is then
        clipped with the task's), and after `scaler.unscale_(optimizer)`. With an optimizer of
        `clext.optim` that has the method, the task's gradient alone is clipped, and the next step
        of one such optimizer takes what was kept.

        Args:
            max_norm: largest total norm of the gradients of the method's parameters, >= 0; with
                infinity they stay as they are, also where they are not finite.
            norm_type: of the norm, > 0 or infinity, as in torch.
            error_if_nonfinite: raise if the norm is not finite.

        Raises:
            ValueError: max_norm or norm_type is not such a number.
            RuntimeError: the norm is not finite, and error_if_nonfinite; or gradients that it has
                clipped were added to since, here or, before anything moves, from the step.
        """
        check_clipping(self.name, max_norm, norm_type)
        self._forget_old_scales()
        # A stamp that no longer holds stays as it is: the step is to find out.
        had_stamp = "path" in self._state.lists and watch.has_stamp(self)
        norm, factor = clip_grads_(self._state.params, max_norm, norm_type, error_if_nonfinite)
        if "path" in self._state.lists:
            self._task_scale = factor if self._task_scale is None else self._task_scale * factor
            self._pull_scale = factor if self._pull_scale is None else self._pull_scale * factor
            watch.mark_clipped(self)
            if had_stamp:
                watch.leave_stamp(self)
        return norm

    def update(self) -> None:
        """Look at a step: after `optimizer.step()`, before the gradients are cleared."""
        self._refuse_if_attached("update")
        self._was_used = True
        if "path" in self._state.lists:
            watch.warn_of_an_early_update(self)

    def consolidate(self, dataloader: Batches | None = None) -> None:
        """End a task: importance and anchor for the tasks to come.

        Args:
            dataloader: iterable of (x, y) batches of the task, x a tensor that the model takes, for
                methods that measure importance on data (EWC, and MAS and SCP, to which x or (x,) is
                enough) or keep examples (Replay, GEM, A-GEM, iCaRL). Others leave it alone.

        Raises:
            ValueError: the data is missing or not as described, a parameter does not fit its state
                (see `refresh_parameters`), or what the steps have left is not finite; nothing is
                changed.
        """
        self._refuse_if_part("consolidate")
        if self._rehearsal is not None and isinstance(dataloader, Iterator):
            batches: Batches | None = [_copied(batch) for batch in dataloader]  # it is read twice
        else:
            batches = dataloader
        grad = torch.is_grad_enabled()
        # Later tasks learn from what is kept, and no graph takes tensors made in inference mode.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            unseen = self._state.unknown(self._parameters_now())
            self.refresh_parameters()
            end = End(self, dataloader, unseen)
            commit = self._learner._prepare_end(batches)
            warn_of_omissions(self, end)
            self._end_task(batches)
            commit()
        for part in self.parts:
            part.tasks += 1
        keep_end(self, end)

    def _end_task(self, dataloader: Batches | None) -> None:
        raise NotImplementedError

    def _note_pull(self) -> None:
        """The parameters were pulled to the anchor, or their gradients changed."""
        self._was_used = self._has_pulled = True
        if (
            not torch.compiler.is_compiling()
            and self._state.params[0].is_cuda
            and torch.cuda.is_current_stream_capturing()
        ):
            self._is_held_unseen = True

    def _held(self) -> list[bool]:
        """Whether the past tasks have left anything in each parameter that a pull would hold."""
        return [
            self.strength > 0 and bool(entry.any()) for entry in self._state.lists["importance"]
        ]

    def _warn_if_zero(self, key: str) -> None:
        """Say so if a task ends without a trace of its steps: nothing would be protected."""
        if not any(bool(entry.any()) for entry in self._state.lists[key]):
            remedy = "call update() after optimizer.step() and before zero_grad()"
            if self._attached:
                remedy = f"take the steps with the optimizer that was given this {self.name}"
            warnings.warn(
                f"clext: {self.name} saw no step of this task that left a trace in the path "
                f"integral; {remedy}",
                stacklevel=4,
            )

    def _refuse_broken(self, *keys: str) -> None:
        """Raise if a step has left NaN or infinity: importance would be made of it."""
        broken = self._state.broken(keys)
        if broken:
            raise ValueError(
                f"{self.name}: {broken} holds NaN or infinity, which a step with such a gradient "
                "has left: go back to state dicts of the model and the method saved before it"
            )

    def _forget_old_scales(self) -> None:
        """Of gradients that are gone: their step was dropped, or a GradScaler has skipped it."""
        if self._task_scale is not None and not watch.is_clipped(self):
            self._forget_scales()

    def _forget_scales_of(self, cleared: Iterable[Tensor]) -> None:
        """If `cleared` are all parameters that have a gradient."""
        if self._task_scale is not None:
            ids = set(map(id, cleared))
            if all(entry.grad is None or id(entry) in ids for entry in self._state.params):
                self._forget_scales()

    def _forget_scales(self) -> None:
        self._task_scale = self._pull_scale = None
        watch.forget_clipped(self)

    def _take_scales(self) -> tuple[Tensor | None, Tensor | None]:
        """What the task's gradient and the penalty's were multiplied with for the step that was."""
        watch.drop_stamp(self)
        if self._task_scale is not None and not watch.is_clipped_by_now(self):
            self._forget_scales()
        scales = self._task_scale, self._pull_scale
        self._forget_scales()
        return scales

    # ------------------------------------------------------------------ for optimizers

    def step_options(self) -> dict[str, float]:
        """Numbers that the optimizer's pass needs: "strength", and "decay" of fisher's average."""
        return {"strength": self._strength, "decay": 0.0}

    def penalty_offset(self) -> float:
        """What the penalty is more than strength * sum of importance * (parameter - anchor)^2."""
        return 0.0

    def take_task_scale(self) -> Tensor | None:
        """What `clip_grad_norm_` has multiplied the gradients with; forgotten with this call.

        RuntimeError if they are not as it left them.
        """
        if not watch.was_stepped_with(self):
            self._forget_old_scales()
        return self._take_scales()[0]

    def _attach(self) -> None:
        """From now on an optimizer's steps do what `add_penalty_grad_` and `update` did."""
        self._refuse_if_part("an optimizer's step")
        if self.fused_state not in _FUSED_STATES or set(self.fused_state) - set(self.state_names):
            raise ValueError(
                f"{self.name}: fused_state is {self.fused_state!r}, expected one of "
                f"{', '.join(map(str, _FUSED_STATES))}, each name also in state_names, or None"
            )
        self._attached = True
        self.refresh_parameters()
        self._state.drop(self.separate_state)

    def _refuse_if_attached(self, name: str) -> None:
        if self._attached:
            raise RuntimeError(
                f"{self.name}: {name}() is not to be called: this method was given to an optimizer "
                "of clext.optim, whose step() does it; leave the call out (for an optimizer of "
                f"another kind make a new {self.name} and load this one's state_dict())"
            )

    def _warn_of_a_second_pull(self, _grad: Tensor) -> None:
        warnings.warn(
            f"clext: penalty() of {self.name} is in the loss, and the step() of the optimizer that "
            "was given this method adds its gradient as well: leave it out of the loss",
            stacklevel=2,
        )


def _copied(batch: Any) -> Any:  # noqa: ANN401  (whatever a user's loader gives)
    """A batch with copies of its tensors: a loader may use them again for the next one."""
    if isinstance(batch, tuple | list):
        return [_copied(entry) for entry in batch]
    return batch.clone() if isinstance(batch, Tensor) else batch
