"""Deep generative replay (Shin et al. 2017, arXiv:1705.08690)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.checks import check_memory, flag, integer, number, softening
from clext.core.inputs import one_tensor
from clext.core.parameters import device_of
from clext.core.seeding import Seeds, restored
from clext.core.seeding import generator as cpu_generator
from clext.methods.parts.teacher import (
    SCALES,
    Teacher,
    check_teacher,
    distillation_loss,
    old_heads,
)
from clext.methods.parts.vae import VAE, check_generator, check_inputs, generator_loss, sample_like
from clext.methods.rehearsal import Rehearsal
from clext.optim import Adam

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Unpack

    from clext.core.batches import Batches
    from clext.core.inputs import Inputs
    from clext.core.supervision import SupervisionOptions
    from clext.methods.base import Examples


class DGR(Rehearsal):
    """A generator learns to make inputs like those of all tasks so far, and they are learned again.

    In each step of a later task the generator as it was before the task makes as many inputs as the
    batch has, and the model as it was labels them: with the class that it finds most likely, or
    with its softened probabilities (`distill`). Their loss is that on what was learned before. With
    a head for each task each of these inputs has a label in every earlier task; with one growing
    head the label is one of the classes seen before, and all classes seen compete (van de Ven and
    Tolias 2018, arXiv:1809.10635).

    The generator takes a step of its own Adam in each `loss` that is made with gradients enabled:
    on the batch and on the same generated inputs, with the same balance. It is no part of the
    model, so a regulariser beside it does not know it. Whether it can learn the inputs is looked at
    once in a task: in `begin_task`, or in the first loss.

    Memory: a copy of the model, the generator with two averages for Adam, and a copy of it, however
    many tasks.

    Args:
        model: see `Method`.
        strength: weight of the loss on generated inputs.
        balance: how the two losses are added: "tasks" where the k-th task counts 1/k, or "sum"; see
            `Rehearsal`.
        distill: learn the old model's softened probabilities rather than its classes.
        temperature: of the softening, from 1e-4 to 1e4.
        scale: of the distillation loss: "squared" for the factor temperature^2, "mean" for that
            divided by the number of outputs that compete, "none" for none.
        hidden: widths of the layers of the variational auto-encoder (`VAE` of
            parts/vae.py), which takes inputs in [0, 1].
        latent: numbers in its code of an input.
        generator: a module of your own instead, trained in place; `loss(inputs)` is 0-dim and
            differentiable, `sample(count, generator)` returns as many inputs, drawn with that
            `torch.Generator`, which is of the CPU.
        generator_lr: learning rate of the generator's Adam.
        seed: of the generator's first weights and of all that is drawn.

    Raises:
        ValueError: an option is out of range, or the generator has no loss and samples.
    """

    name: ClassVar[str] = "dgr"
    needs_classes: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"balance": ("tasks", "sum"), "scale": SCALES}
    needs_first_task: bool = True  # the generator learns in it
    capturable: bool = False  # it draws, and the generator takes a step of its own

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float | None = None,
        balance: str = "tasks",
        distill: bool = False,
        temperature: float = 2.0,
        scale: str = "squared",
        hidden: Sequence[int] = (400, 400),
        latent: int = 100,
        generator: nn.Module | None = None,
        generator_lr: float = 1e-3,
        seed: int = 0,
        **supervision: Unpack[SupervisionOptions],
    ) -> None:
        super().__init__(model, strength=strength, balance=balance, **supervision)
        self.distill = flag(self.name, "distill", distill)
        self.temperature = softening(self.name, temperature)
        self.scale = self._choice("scale", scale)
        self.hidden = _widths(self.name, hidden)
        self.latent = integer(self.name, "latent", latent, minimum=1)
        _check_size(self.name, self.hidden, self.latent)
        self.generator = None if generator is None else check_generator(self.name, generator)
        self._makes_generator = generator is None
        self.generator_lr = number(
            self.name, "generator_lr", generator_lr, minimum=0.0, open_minimum=True
        )
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self._random = cpu_generator(self.seed)
        self._optimizer: Adam | None = None  # of the generator, once it is in use
        self._teacher: Teacher | None = None  # model and generator at the end of the last task
        self._previous: nn.Module | None = None
        self._ready_for: int | None = None  # the task whose inputs the generator can learn

    def _follow_model(self) -> None:
        device = device_of(self.model)
        for module in (self.generator, self._previous, self._teacher):
            if module is not None:
                module.to(device)

    # ------------------------------------------------------------------ learning

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if examples is not None:
            self._make_ready(one_tensor(self.name, examples[0]))
        return examples

    def _loss(self, inputs: Inputs, labels: Any, *more: Any) -> Tensor:  # noqa: ANN401
        inputs = one_tensor(self.name, inputs)
        # First of all that can fail: a batch that the model does not take has taught nothing.
        current = super()._loss(inputs, labels, *more)
        if self._ready_for != self.tasks:
            self._make_ready(inputs)
        draws = self.heads.processes.own_generator(self._random)
        if self._teacher is None or self._previous is None:
            self._train_generator(inputs, draws)
            return current
        replayed = sample_like(self.name, self._previous, inputs, draws)
        logits, teacher = self.heads.logits(replayed), self._teacher(replayed)
        self.heads.check_width(self.name, logits.shape[1], teacher.shape[1])
        losses = [
            self._replayed_loss(logits[:, now], teacher[:, then])
            for now, then in old_heads(self.heads, self.tasks, teacher.shape[1])
        ]
        self._train_generator(inputs, draws, replayed)
        return self._balanced(current, self._over_tasks(losses))

    def _replayed_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self.distill:
            return distillation_loss(logits, teacher, self.temperature, self.scale)
        return F.cross_entropy(logits, teacher.argmax(dim=1))

    def _train_generator(
        self, inputs: Tensor, draws: torch.Generator, replayed: Tensor | None = None
    ) -> None:
        """A step of the generator, unless this is a look at the loss only."""
        if not torch.is_grad_enabled():
            return
        assert self.generator is not None
        assert self._optimizer is not None
        loss = generator_loss(self.name, self.generator, inputs.detach(), draws)
        if replayed is not None:
            old = generator_loss(self.name, self.generator, replayed, draws)
            loss = self._balanced(loss, old)
        self._optimizer.zero_grad()  # what a backward pass may have left that failed
        with torch.autocast(inputs.device.type, enabled=False):
            loss.backward()
            self._average_gradients()
            self._optimizer.step()
        self._optimizer.zero_grad()

    def _average_gradients(self) -> None:
        """Of the generator, over the processes, which all have the same one."""
        processes = self.heads.processes
        if processes.groups:
            assert self.generator is not None
            gradients = [p.grad for p in self.generator.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, processes.size)
            processes.sum_(gradients)

    def _end_task(self, dataloader: Batches | None) -> None:  # noqa: ARG002
        check_teacher(self.name, self.model)
        previous = None
        # One that has never learned would replay noise.
        if self.generator is not None and (self.steps or self._previous is not None):
            check_teacher(self.name, self.generator, "generator")
            previous = _frozen_copy(self.generator)
        self._teacher, self._previous = Teacher(self.model, self.heads.logits), previous

    # ------------------------------------------------------------------ the generator

    def _make_ready(self, inputs: Tensor) -> None:
        """Make the generator, if there is none; ValueError if it does not go with these inputs."""
        new = self.generator
        if new is None:
            new = self._new_generator(inputs.shape[1:])
        check_inputs(self.name, new, inputs)
        # Apart from what is drawn in the steps.
        trial = sample_like(self.name, new.to(inputs.device), inputs[:2], cpu_generator(self.seed))
        if not bool(trial.isfinite().all()):
            raise ValueError(
                f"{self.name}: sample(...) of the generator returned NaN or infinity, expected "
                "inputs to learn from; give it finite weights, or a smaller generator_lr"
            )
        self.generator, self._ready_for = new, self.tasks
        self._optimizer = self._optimizer or self._new_optimizer(new)

    def _new_generator(self, shape: Sequence[int]) -> VAE:
        """Its weights are drawn on the CPU: the same on every device."""
        seed = Seeds.derive(self.seed).model  # apart from what is drawn in the steps
        generator = VAE(shape, self.hidden, self.latent, cpu_generator(seed))
        parameter = next(self.model.parameters())
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return generator.to(parameter.device, dtype)

    def _new_optimizer(self, generator: nn.Module) -> Adam:
        trained = [entry for entry in generator.parameters() if entry.requires_grad]
        return Adam(trained, lr=self.generator_lr)

    # ------------------------------------------------------------------ state

    def _save(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"random": self._random.get_state()}
        if self.generator is not None:
            extra["generator"] = dict(self.generator.state_dict())
        if isinstance(self.generator, VAE):
            extra["shape"] = list(self.generator.shape)
        if self._optimizer is not None:
            extra["optimizer"] = self._optimizer.state_dict()
        if self._teacher is not None and self._previous is not None:
            extra["teacher"] = self._teacher.state_dict()
            extra["previous"] = dict(self._previous.state_dict())
        return {"extra": copy.deepcopy(extra)}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        extra, device = state["extra"], device_of(self.model)
        self._random = restored(self.seed, extra.get("random"))
        self._optimizer = self._teacher = self._previous = self._ready_for = None
        if self._makes_generator:
            self.generator = self._new_generator(extra["shape"]) if "shape" in extra else None
        if self.generator is None:
            return
        self.generator.to(device)
        if "generator" in extra:
            self.generator.load_state_dict(extra["generator"])
        if "optimizer" in extra:
            self._optimizer = self._new_optimizer(self.generator)
            self._optimizer.load_state_dict(copy.deepcopy(extra["optimizer"]))
        if "previous" in extra:
            self._teacher = Teacher.load(self.model, extra["teacher"], self.heads.logits)
            self._previous = _frozen_copy(self.generator)
            self._previous.load_state_dict(extra["previous"])


def _frozen_copy(generator: nn.Module) -> nn.Module:
    return copy.deepcopy(generator).eval().requires_grad_(False)


def _widths(owner: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(
            f"{owner}: hidden must be the widths of at least one layer, such as (400, 400), got "
            f"{given!r}"
        )
    return tuple(integer(owner, "a width in hidden", width, minimum=1) for width in given)


def _check_size(owner: str, hidden: tuple[int, ...], latent: int) -> None:
    numbers = sum(math.prod(pair) for pair in pairwise((*hidden, latent)))
    check_memory(owner, "(*hidden, latent)", (*hidden, latent), numbers)
