"""Deep generative replay (Shin et al. 2017, arXiv:1705.08690)."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.checks import integer, number, softening
from clext.core.seeding import Seeds, isolated_rng
from clext.methods.parts.batch import labelled
from clext.methods.parts.distillation import SCALES, distillation_loss, old_heads
from clext.methods.parts.sampling import Sampling
from clext.methods.parts.teacher import Snapshot, refuse_broken
from clext.methods.parts.vae import (
    VAE,
    check_generator,
    check_inputs,
    check_state,
    generator_loss,
    sample_like,
)
from clext.methods.rehearsal import Rehearsal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clext.importance.passes import Batches
    from clext.methods.learning import Examples
    from clext.methods.stateful import Commit
    from clext.optim import Adam

_STATE = ("random", "shape", "generator", "optimizer", "teacher", "previous")


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
    model, so a regulariser beside it does not know it. A batch that it cannot learn is refused
    before: by its shape and type, and by its values, at which other devices than the CPU, where it
    would have to be waited for, look once in a task.

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
            `torch.Generator`.
        generator_lr: learning rate of the generator's Adam.
        seed: of the generator's first weights and of all that is drawn, on the inputs' device.

    Raises:
        ValueError: an option is out of range, or the generator has no loss and samples.
    """

    name: ClassVar[str] = "dgr"
    choices: ClassVar[dict[str, tuple[str, ...]]] = {"balance": ("tasks", "sum"), "scale": SCALES}
    memory: ClassVar[dict[str, str]] = {
        "teacher": "4*(P + Q)",
        "generator": "4*G",
        "optimizer": "8*G",
        "previous generator": "4*G",
    }
    recordable = False  # it draws, and the generator takes a step of its own

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
    ) -> None:
        super().__init__(model, strength=strength, balance=balance)
        if type(distill) is not bool:
            raise ValueError(f"{self.name}: distill must be True or False, got {distill!r}")
        self.distill = distill
        self.temperature = softening(self.name, temperature)
        self.scale = self._choice("scale", scale)
        self.hidden = _widths(self.name, hidden)
        self.latent = integer(self.name, "latent", latent, minimum=1)
        self.generator = None if generator is None else check_generator(self.name, generator)
        self._makes_generator = generator is None
        self.generator_lr = number(
            self.name, "generator_lr", generator_lr, minimum=0.0, open_minimum=True
        )
        self.seed = integer(self.name, "seed", seed, minimum=0)
        self._sampling = Sampling(self.seed)
        self._optimizer: Adam | None = None  # of the generator, once it is in use
        self._teacher: Snapshot | None = None  # model and generator at the end of the last task
        self._previous: nn.Module | None = None
        self._shape: Sequence[int] | None = None  # of an input; not known after a load
        self._looked_at: int | None = None  # the task of which the values were looked at

    # ------------------------------------------------------------------ learning

    def _begin_task(self, examples: Examples | None) -> Examples | None:
        if examples is not None:
            self._check_inputs(examples[0], values=True)
            if not self._take_up_generator(examples[0]) and self._previous is not None:
                self._try(self._previous, examples[0])
            self._looked_at = self.tasks
        return examples

    def _loss(self, *batch: Tensor) -> Tensor:
        inputs, labels = labelled(self.name, batch)
        # To look at the values on another device would wait for it: there once in a task.
        self._check_inputs(inputs, values=inputs.is_cpu or self._looked_at != self.tasks)
        # First of all that can fail: a batch that the model does not take has taught nothing.
        current = super()._loss(inputs, labels)
        self._take_up_generator(inputs)
        self._looked_at = self.tasks
        if self._teacher is None or self._previous is None:
            self._train_generator(inputs)
            return current
        with self._sampling.unless_it_fails():
            random = self._sampling.on(inputs.device)
            replayed = sample_like(self.name, self._previous, inputs, random)
            with self.outputs.full():
                logits, teacher = self.outputs.logits(replayed), self._teacher(replayed)
            self.outputs.check_width(self.name, logits.shape[1], teacher.shape[1])
            losses = [
                self._replayed_loss(logits[:, now], teacher[:, then])
                for now, then in old_heads(self.outputs, self.tasks, teacher.shape[1])
            ]
            loss = self._balanced(current, self._over_tasks(losses))
            self._train_generator(inputs, replayed)  # last, when nothing else can fail
        return loss

    def _replayed_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self.distill:
            return distillation_loss(logits, teacher, self.temperature, self.scale)
        return F.cross_entropy(logits, teacher.argmax(dim=1))

    def _train_generator(self, inputs: Tensor, replayed: Tensor | None = None) -> None:
        """A step of the generator, unless this is a look at the loss only."""
        if not torch.is_grad_enabled():
            return
        assert self.generator is not None
        assert self._optimizer is not None
        random = self._sampling.on(inputs.device)
        loss = generator_loss(self.name, self.generator, inputs.detach(), random)
        if replayed is not None:
            old = generator_loss(self.name, self.generator, replayed, random)
            loss = self._balanced(loss, old)
        self._optimizer.zero_grad()  # what a backward pass may have left that failed
        with torch.autocast(inputs.device.type, enabled=False):
            loss.backward()
            self._optimizer.step()
        self._optimizer.zero_grad()

    def _prepare_end(self, dataloader: Batches | None) -> Commit:  # noqa: ARG002
        refuse_broken(self.name, self.model)
        teacher = Snapshot(self.model)
        previous = None
        if self.generator is not None and self._optimizer is not None:
            refuse_broken(self.name, self.generator, "generator")
            previous = _frozen_copy(self.generator)
        if self.tasks == 0 and not self._has_made_loss:
            previous = None
            warnings.warn(
                f"clext: loss() of this {self.name} was not called in this task, so its generator "
                "has learned nothing and no later task will replay this one; train on loss(x, y) "
                "of the method, in place of a loss of your own",
                stacklevel=3,
            )

        def commit() -> None:
            self._teacher, self._previous = teacher, previous

        return commit

    # ------------------------------------------------------------------ the generator

    def _take_up_generator(self, inputs: Tensor) -> bool:
        """Make the generator, or try the one given, if none is in use; returns whether that was so.

        ValueError if it does not fit the inputs; nothing is changed.
        """
        if self._optimizer is not None:
            return False
        generator = self.generator
        if generator is None:
            generator = self._new_generator(inputs.shape[1:])
        generator.to(inputs.device)
        self._try(generator, inputs)
        self.generator, self._optimizer = generator, self._new_optimizer(generator)
        self._shape = inputs.shape[1:]
        return True

    def _try(self, generator: nn.Module, inputs: Tensor) -> None:
        """ValueError if what it makes is not like these inputs, or not finite."""
        trial = torch.Generator(inputs.device).manual_seed(self.seed)
        if not bool(sample_like(self.name, generator, inputs[:2], trial).isfinite().all()):
            raise ValueError(
                f"{self.name}: sample(...) of the generator returned NaN or infinity, expected "
                "inputs to learn from; give it finite weights, or a smaller generator_lr"
            )

    def _new_generator(self, shape: Sequence[int]) -> VAE:
        """Its weights are drawn on the CPU: the same on every device."""
        seed = Seeds.derive(self.seed).model  # apart from what is drawn in the steps
        with isolated_rng(seed, torch.device("cpu")):
            generator = VAE(shape, self.hidden, self.latent)
        parameter = self._state.params[0]
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        return generator.to(parameter.device, dtype)

    def _check_inputs(self, inputs: Tensor, *, values: bool) -> None:
        """ValueError unless the generator can learn them; `values` looks at the numbers too."""
        own = self.generator is not None and not isinstance(self.generator, VAE)
        shape = self.generator.shape if isinstance(self.generator, VAE) else self._shape
        if shape is not None and inputs.shape[1:] != shape:
            raise ValueError(
                f"{self.name}: inputs have shape {list(inputs.shape)}, expected "
                f"{['N', *shape]}, which the generator makes"
            )
        check_inputs(self.name, inputs, bounded=not own, values=values)

    def _new_optimizer(self, generator: nn.Module) -> Adam:
        from clext.optim import Adam  # which needs the base of this module

        trained = [entry for entry in generator.parameters() if entry.requires_grad]
        return Adam(trained, lr=self.generator_lr)

    # ------------------------------------------------------------------ state

    def _extra_state(self) -> dict[str, Any]:
        if self._optimizer is None or self.generator is None:
            return {}
        state: dict[str, Any] = {
            "random": self._sampling.state_dict(),
            "generator": dict(self.generator.state_dict()),
            "optimizer": self._optimizer.state_dict(),
        }
        if isinstance(self.generator, VAE):
            state["shape"] = list(self.generator.shape)
        if self._teacher is not None and self._previous is not None:
            state["teacher"] = self._teacher.state_dict()
            state["previous"] = dict(self._previous.state_dict())
        return copy.deepcopy(state)

    def _prepare_extra_state(self, extra: Mapping[str, Any]) -> Commit:
        owner = f"{self.name}: state_dict['extra']"
        missing = {"random", "generator", "optimizer"} - extra.keys() if extra else set()
        if unknown := sorted([*(extra.keys() - set(_STATE)), *missing], key=str):
            raise ValueError(f"{owner} does not fit: {unknown[0]!r} is missing or unexpected")
        if ("teacher" in extra) != ("previous" in extra):
            raise ValueError(f"{owner} holds one of 'teacher' and 'previous', expected both")
        if not extra:
            return self._forget
        device = self._state.params[0].device
        sampling = Sampling.load(f"{owner}['random']", self.seed, extra["random"], device)
        generator = self._generator_of(owner, extra)
        check_state(f"{owner}['generator']", generator, extra["generator"])
        optimizer = self._new_optimizer(generator)
        try:
            optimizer.load_state_dict(extra["optimizer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{owner}['optimizer'] does not fit: {error}") from None
        teacher = previous = None
        if "teacher" in extra:
            teacher = Snapshot.load(f"{owner}['teacher']", self.model, extra["teacher"])
            check_state(f"{owner}['previous']", generator, extra["previous"])
            previous = _frozen_copy(generator).to(device)
            previous.load_state_dict(extra["previous"])

        def commit() -> None:
            generator.to(device).load_state_dict(extra["generator"])
            self.generator, self._optimizer, self._sampling = generator, optimizer, sampling
            self._teacher, self._previous = teacher, previous
            self._shape = self._looked_at = None

        return commit

    def _generator_of(self, owner: str, extra: Mapping[str, Any]) -> nn.Module:
        """The module that the state of a generator is for."""
        generator, shape = self.generator, extra.get("shape")
        if generator is None:
            if not isinstance(shape, list) or not shape:
                raise ValueError(
                    f"{owner} is of another generator than the variational auto-encoder; make the "
                    "method with that generator"
                )
            sizes = [integer(owner, "'shape'", size, minimum=1) for size in shape]
            return self._new_generator(sizes)
        return generator

    def _forget(self) -> None:
        """As if no step had been taken; a generator of the user's own keeps what it has learned."""
        if self._makes_generator:
            self.generator = None
        self._sampling, self._optimizer = Sampling(self.seed), None
        self._teacher = self._previous = self._shape = self._looked_at = None

    def _move_extra_state(self, device: torch.device) -> None:
        for module in (self.generator, self._previous):
            if module is not None:
                module.to(device)
        if self._teacher is not None:
            self._teacher.move(device)


def _frozen_copy(generator: nn.Module) -> nn.Module:
    return copy.deepcopy(generator).eval().requires_grad_(False)


def _widths(owner: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(
            f"{owner}: hidden must be the widths of at least one layer, such as (400, 400), got "
            f"{given!r}"
        )
    return tuple(integer(owner, "a width in hidden", width, minimum=1) for width in given)
