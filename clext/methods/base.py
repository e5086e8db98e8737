"""The method: a loss, a pull on the gradient, a look at each step, and the end of a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clext.core.batches import check_examples
from clext.core.checks import choice
from clext.core.likelihood import CATEGORICAL
from clext.core.parameters import trainable_parameters
from clext.core.sharding import is_sharded
from clext.methods.parts.attachment import Attachment
from clext.methods.parts.flat import flattened, nested
from clext.methods.parts.heads import Heads, check_range
from clext.methods.parts.options import check_options, checked_strength, described, warn_if_unused

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from typing import Unpack

    from torch.optim import Optimizer

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions

# What a task is trained on: inputs and labels, and what a method has added, with one row for each
# example. A row of each is what the loss takes.
Examples = tuple[Any, ...]


class Method:
    """A continual-learning method on one model; this one only learns.

    The loop is the same for all::

        method.begin_task()             # where tasks have heads, or a method prepares something
        loss = method.loss(x, y)        # or a loss of your own, for methods that only protect
        loss.backward()
        method.add_penalty_grad_()      # or, before backward: loss = loss + method.penalty()
        optimizer.step()                # clip before it if you like
        method.update()
        optimizer.zero_grad()
        method.consolidate(dataloader)  # at the end of each task

    `method.attach(optimizer)` makes the two calls around each step of any optimizer of torch; one
    of `clext.optim` that is given the method does all of it in the pass that steps. A subclass
    keeps each option in an attribute of its name and overrides the hooks below that it needs;
    what can fail is computed first, then assigned.

    Args:
        model: its trainable parameters are meant; frozen ones are not touched. ValueError if there
            are none, or one that no state can be kept for.
        strength: weight of what keeps the past, >= 0; may be changed at any time.
        options: what of a batch goes into the model and how labels follow from its outputs, for
            others than (x, y) with classes y: `forward`, `labels`, `loss`, `likelihood`; and `sync`
            for several processes; see `clext.Supervision`.
    """

    name: ClassVar[str]
    default_strength: ClassVar[float] = 0.0
    has_strength: ClassVar[bool] = False  # there is something to weigh
    has_penalty: ClassVar[bool] = False  # add_penalty_grad_ keeps the past
    has_own_loss: ClassVar[bool] = False  # loss keeps the past
    needs_first_task: bool = False  # so do the steps of the first task
    needs_classes: ClassVar[bool] = False  # logits [N, outputs], and one class for each example
    needs_examples: ClassVar[bool] = False  # begin_task with all of the task's
    needs_whole: ClassVar[bool] = False  # parameters: it copies the model, or keeps gradients
    runs_model: ClassVar[bool] = False  # add_penalty_grad_ does, in the precision of the loss
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}  # of options in words, the default first
    counter_names: tuple[str, ...] = ("tasks", "steps")
    fused: tuple[str, ...] | None = ()  # state that an optimizer's pass works on; None: it cannot
    decay: float = 0.0  # weight of the old average of squares ("fisher") in that pass
    constant: float = 0.0  # of the penalty, without strength
    takes_optimizer: bool = False  # consolidate does, in place of data
    capturable: bool = True  # in a CUDA graph the loss does the same at each replay
    _combined: ClassVar[Callable[[Method, Method], Method]]  # set where that class is defined

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        trainable_parameters(model)
        check_options(type(self), supervision)
        if self.needs_whole and any(map(is_sharded, model.parameters())):
            raise ValueError(
                f"{self.name} needs whole parameters, got a model sharded by fully_shard or tensor "
                "parallelism; wrap it in DistributedDataParallel, or take a regulariser or replay"
            )
        self.model, self.heads = model, Heads(model, **supervision)
        if self.needs_classes and self.heads.options["likelihood"] != CATEGORICAL:
            raise ValueError(
                f"{self.name} needs classes: expected likelihood={CATEGORICAL!r}, got "
                f"{self.heads.options['likelihood']!r}"
            )
        self.strength = checked_strength(type(self), strength)
        self.tasks = 0  # ended so far
        self.steps = 0  # of this task that the method had a part in

    def begin_task(
        self,
        examples: Examples | None = None,
        *,
        block: range | None = None,
        active: range | None = None,
    ) -> Examples | None:
        """Begin a task, on the model as it is now; returns what to train on.

        Args:
            examples: inputs [N, ...] and local labels [N] int64 of the whole task, for methods that
                prepare something or train on more (LwF, joint, iCaRL), on the model's device. The
                same rows of all tensors that are returned are the arguments of `loss`.
            block: the outputs that are the classes of this task; None: all.
            active: the outputs that compete: the task's own (a head for each task), or all seen (a
                growing head); `heads(x)` returns these, labels count from the first. None: all.
        """
        before = self.heads.state_dict()
        try:
            self._follow_model()
            self.heads.begin_task(block, active, ended=self.tasks)
            if examples is not None:
                allowed = self.heads.classes if block else None
                check_examples(f"{self.name}: begin_task", examples, allowed)
            return self._begin_task(examples)
        except BaseException:
            self.heads.load_state_dict(before)
            raise

    def loss(self, *batch: Any) -> Tensor:  # noqa: ANN401  (as the loader gives them)
        """The loss without the penalty, 0-dim, of (x, y), of a whole batch as one argument, or of
        rows of what `begin_task` returned. What else a loader gives is not looked at.

        TypeError or ValueError for what is no batch: see `clext.Supervision`.
        """
        value = self._loss(*self.heads.arguments(batch))
        self.steps += self.has_own_loss
        return value

    def penalty(self, params: Mapping[str, Tensor] | None = None) -> Tensor:  # noqa: ARG002
        """What is to be added to the loss, strength included: 0-dim, differentiable. Here zero.

        `params`: of these values by parameter name in place of the model's, as
        `torch.func.functional_call` takes them; then nothing is noted of a step.
        """
        return torch.zeros((), device=next(self.model.parameters()).device)

    def add_penalty_grad_(self, scaler: object = None) -> Tensor:  # noqa: ARG002
        """Add the penalty's gradient to `.grad`; returns the penalty (0-dim). Here zero.

        Call it once in a step, on complete gradients; after it they may be clipped or dropped.
        `scaler`: the GradScaler (or factor) by which they are scaled still; none after `unscale_`.
        """
        return self.penalty()

    def update(self) -> None:
        """Look at a step, after it."""
        self._after_step()

    def attach(self, optimizer: Optimizer) -> Attachment:
        """Call `add_penalty_grad_` before and `update` after each step, closures included.

        Returns a handle: `remove()` ends it, `penalty` is the value before the last step.
        """
        return Attachment(self, optimizer)

    def consolidate(self, dataloader: Batches | Optimizer | None = None) -> None:
        """End a task: take what is to be kept of it.

        `dataloader`: batches, for methods that measure importance on data (MAS and SCP do without
        labels) or keep examples; see `clext.Supervision`. EWC(fisher="optimizer") takes the
        optimizer in its place. Of several processes that train the model each gives its share of
        the data, and all have the same at the end; see `sync` of `clext.Supervision`. ValueError:
        they are not such, or the steps have left NaN; nothing is changed.
        """
        grad = torch.is_grad_enabled()
        # No later loss could use what is made in inference mode.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            self._follow_model()
            processes = self.heads.processes
            if processes.groups:
                processes.follow_first_(self.model.buffers())  # as DDP does at the next forward
                processes.check_equal(self.name, self._copies())
            self._end_task(dataloader)  # type: ignore[arg-type]  # an optimizer is EWC's to refuse
        self.tasks, steps, self.steps = self.tasks + 1, self.steps, 0
        warn_if_unused(self, steps)

    def predict(self, inputs: Inputs, *, active: range | None = None) -> Tensor:
        """A score for each example and output [N, active]; `active`: others (an earlier head)."""
        check_range("predict: active", active)
        return self._predict(inputs, self.heads.active if active is None else active)

    def combine(self, learner: Method) -> Method:
        """`clext.Combined(self, learner)`: this method's pull with the loss of another."""
        return type(self)._combined(self, learner)

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that training needs to go on, but the options: plain dicts."""
        return {
            "method": self.name,
            "strength": self.strength,
            "counters": {name: getattr(self, name) for name in self.counter_names},
            "outputs": self.heads.state_dict(),
            **self._save(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over such a state; the model's is loaded before. ValueError: nothing is changed."""
        self._follow_model()
        before = self.state_dict()
        try:
            self._load(state_dict)
        except Exception as error:
            self._load(before)
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{self.name}: the state does not fit: {reason}") from error

    def flat_state_dict(self) -> dict[str, Tensor]:
        """`state_dict` as contiguous tensors by name, for safetensors or torch's DCP.

        "importance.<parameter>", "anchor.<parameter>" and so on; "json" holds what is no tensor.
        """
        return flattened(self.state_dict())

    def load_flat_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """As `load_state_dict`; prefixes that a wrapper gave to the parameters do not matter."""
        self.load_state_dict(nested(flat))

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods of a combination; else this one."""
        return (self,)

    # ------------------------------------------------------------------ hooks of subclasses

    def check_classes(self, tasks: Sequence[Collection[int]]) -> None:
        """ValueError if the method cannot learn tasks to come with these (global) classes."""

    def _follow_model(self) -> None:
        """The model may have changed since the last task."""

    def _copies(self) -> dict[str, Tensor]:
        """What several processes with the same model have alike, by what it is called."""
        return {f"parameter '{name}'": entry for name, entry in self.model.named_parameters()}

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        return examples

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401, ARG002
        return self.heads.loss(inputs, labels)

    def _predict(self, inputs: Inputs, active: range | None) -> Tensor:
        return self.heads.narrow(self.heads.outputs(inputs), active)

    def _check_unpulled(self, remedy: str) -> None:
        """RuntimeError if the pull is in the gradients before an optimizer's pass adds it."""

    def _after_step(self) -> None:
        """After a step, whoever took it."""

    def _end_task(self, dataloader: Batches | None) -> None:
        """As `consolidate`."""

    def _save(self) -> dict[str, Any]:
        """What is kept beside counters and heads."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:
        """As `load_state_dict`, which takes back what fails halfway."""
        if state["method"] != self.name:
            raise ValueError(f"it is of method {state['method']!r}, not {self.name!r}")
        self.strength = checked_strength(type(self), state["strength"])
        for name in self.counter_names:  # an older state has no "steps"
            value = getattr(self, name)
            setattr(self, name, type(value)(state["counters"].get(name, value)))
        self.heads.load_state_dict(state["outputs"])

    def _choice(self, option: str, value: object) -> str:
        return choice(self.name, option, value, self.choices[option])

    def __repr__(self) -> str:
        return described(self)
