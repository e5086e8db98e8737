"""The base of a PEFT model, protected while LoRA trains (EWC-LoRA, arXiv:2602.17559)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clext import ops
from clext.core.lists import state_dtype
from clext.core.parameters import canonical_names
from clext.core.sharding import is_sharded
from clext.methods import Method
from clext.methods.combined import delegated
from clext.methods.kfac import KFAC
from clext.methods.parts.options import scale_of
from clext.methods.parts.state import ALL_FROZEN
from clext.methods.parts.step import Step
from clext.methods.quadratic import QuadraticPenalty

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch.optim import Optimizer

    from clext.core.batches import Batches
    from clext.methods.parts.state import ParameterState


class MergedPenalty(Method):
    """The penalty of a method on the weights as LoRA merges them, for training by LoRA.

    A method that has measured a model (EWC, MAS, SCP) protects its parameters. LoRA freezes these
    and trains two factors beside each weight W, which then does what W + s B A would. Here

        penalty = strength * sum of F * (W + s B A - anchor)^2

    with the method's own importance F and anchor, and gradients to A and B; no more than the change
    of one layer is in memory at a time. Parameters of the base that are trained themselves (biases,
    `modules_to_save`) are pulled as ever. ::

        reg.consolidate(loader)                     # on the plain model
        lora = peft.get_peft_model(model, config)
        guard = MergedPenalty(reg)
        guard.attach(optimizer)                     # or by hand, or in a framework, as any method
        ...
        guard.consolidate(next_loader)              # measured on the weights as merged
        model = lora.merge_and_unload()             # if you like: reg protects the merged weights

    `consolidate` measures what `merge_and_unload` would make, of all that the method knows, and the
    anchor is there; the model stays as it is. Options, counts and state are the method's own. It is
    in no `Combined`, whose two methods begin with their first task together. (SI
    and RWalk, which follow the steps of the weights themselves, learn nothing of LoRA's.)

    Args:
        base: EWC, MAS, ... of the model that `get_peft_model` was given.

    Raises:
        ValueError: LoRA changes nothing that `base` knows, or something changes it in another way
            (DoRA, lora_bias, IA3, ...).
    """

    has_strength = has_penalty = True
    fused = None  # optimizers call it around the step

    strength: float = delegated("base", "strength")
    steps: int = delegated("base", "steps")
    tasks: int = delegated("base", "tasks")
    constant: float = delegated("base", "constant")

    def __init__(self, base: QuadraticPenalty) -> None:
        if not isinstance(base, QuadraticPenalty):
            raise ValueError(
                f"MergedPenalty: base is a {type(base).__name__}, expected a method with a "
                "quadratic penalty, such as clext.EWC(model)"
            )
        if isinstance(base, KFAC):
            raise ValueError(
                "MergedPenalty: kfac has factors of a layer's weights, and what LoRA changes is "
                "pulled by an importance of each; take clext.EWC(model)"
            )
        if any(map(is_sharded, base.model.parameters())):
            raise ValueError(
                "MergedPenalty needs whole parameters, got a model sharded by fully_shard or "
                "tensor parallelism; train the adapters under DistributedDataParallel"
            )
        self.base, self.model, self.heads = base, base.model, base.heads
        self.name = f"lora+{base.name}"  # type: ignore[misc]
        self._step = Step(follows_path=False)
        self._follow_model()
        if not MergedWeights(base).changes:
            raise ValueError(
                f"MergedPenalty: LoRA changes no parameter that this {base.name} knows; make the "
                f"{base.name} of the model first, then give that model to peft.get_peft_model"
            )

    def penalty(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """The penalty: 0-dim, differentiable, to be added to the loss; see `Method.penalty`."""
        if params is not None:
            return self.base.penalty(params)
        weights = MergedWeights(self.base)
        penalty = self.strength * (weights.penalty() + self.constant)
        if penalty.requires_grad:
            state = cast("ParameterState", weights)
            penalty.register_hook(lambda _: self._step.follow_backward(state))
            self.steps += 1
        return penalty

    def add_penalty_grad_(self, scaler: object = None) -> Tensor:
        """Add the penalty's gradient to `.grad`; returns the penalty (0-dim).

        `scaler` and errors are those of any method with a quadratic penalty.
        """
        weights = cast("ParameterState", MergedWeights(self.base))
        value = self._step.pull(weights, self.strength, scale_of(scaler))
        self.steps += 1
        return value + self.strength * self.constant

    def update(self) -> None:
        """The step is over."""
        self._step.end()

    def consolidate(self, dataloader: Batches | Optimizer | None = None) -> None:
        """End a task: `base.consolidate(dataloader)` on the model as it is with LoRA merged."""
        if self.base.takes_optimizer:
            raise ValueError(
                f"{self.name}: no optimizer has second moments of weights that LoRA trains; take "
                'another fisher= than "optimizer" to measure them'
            )
        with merged(self.model), only_known_trainable(self.base):
            self.base.consolidate(dataloader)

    def _follow_model(self) -> None:
        with only_known_trainable(self.base):
            self.base.refresh_parameters()
        known = set(map(id, self.base._state.params))
        for name, layer in self.model.named_modules():
            if isinstance(layer, BaseTunerLayer):
                weights = layer.get_base_layer().parameters()
                if any(id(entry) in known for entry in weights) and not _adds_a_product(layer):
                    raise ValueError(
                        f"MergedPenalty: {type(layer).__name__} '{name}' changes its layer by more "
                        "than s B A added to the weight (DoRA, lora_bias, another adapter); use "
                        "plain LoRA"
                    )

    def state_dict(self) -> dict[str, Any]:
        """That of `base`: there is no other state."""
        return self.base.state_dict()

    def _load(self, state: Mapping[str, Any]) -> None:
        self.base._load(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": Step(follows_path=False)}

    def __repr__(self) -> str:
        return f"MergedPenalty({self.base!r})"


class Change(NamedTuple):
    """A weight of the base that LoRA changes, and what is known of it."""

    layer: Any  # of LoRA
    adapters: list[str]  # that are active
    weight: Tensor
    anchor: Tensor
    importance: Tensor

    def delta(self) -> Tensor:
        """S B A, summed over the adapters and laid out like the weight; differentiable."""
        parts: list[Tensor] = [self.layer.get_delta_weight(name) for name in self.adapters]
        total = sum(parts[1:], start=parts[0])
        return torch.empty_like(self.weight, dtype=total.dtype).copy_(total)

    @property
    def quadratic(self) -> tuple[list[Tensor], list[Tensor]]:
        """Anchor and importance of the change: F (W + s B A - anchor)^2 has it at anchor - W."""
        anchor = self.anchor - self.weight.detach().to(state_dtype(self.weight.dtype))
        return [anchor.to(self.importance.dtype)], [self.importance]

    @property
    def factors(self) -> list[Tensor]:
        """A and B of all adapters, as far as they are trained."""
        base = set(self.layer.get_base_layer().parameters())
        return [p for p in self.layer.parameters() if p.requires_grad and p not in base]

    def penalty(self) -> Tensor:
        """Sum of F * (W + s B A - anchor)^2."""
        return ops.quadratic_penalty([self.delta()], *self.quadratic)


class MergedWeights:
    """What is trained of the base now, by LoRA and by itself; like a `ParameterState` to a step.

    Nothing is kept from one step to the next: adapters may be added, switched and merged.
    """

    is_sharded = False  # `MergedPenalty` refuses such

    def __init__(self, base: QuadraticPenalty) -> None:
        self.model = base.model
        state = base._state
        both = zip(state.lists["anchor"], state.lists["importance"], strict=True)
        known = dict(zip(map(id, state.params), both, strict=True))
        changes = [
            Change(layer, adapters, weight, *known[id(weight)])
            for layer, adapters in active_layers(base.model)
            if id(weight := layer.get_base_layer().weight) in known
        ]
        self.changes = [change for change in changes if change.factors]
        pairs = [(entry, entry) for entry in state.params] + trained_copies(base.model)
        trained = [
            (entry, *known[id(original)])
            for entry, original in pairs
            if id(original) in known and entry.requires_grad
        ]
        self.trained = tuple([entry[i] for entry in trained] for i in range(3))
        self.params = [entry for change in self.changes for entry in change.factors]
        self.params += [entry for entry, *_ in trained]

    def penalty(self) -> Tensor:
        """Without strength: 0-dim, differentiable; a layer's change is made anew in backward."""
        if not self.params:
            raise ValueError(ALL_FROZEN)
        value = ops.quadratic_penalty(*self.trained)
        for change in self.changes:
            value = value + checkpoint(
                change.penalty, use_reentrant=False, preserve_rng_state=False
            )
        return value

    def add_penalty_grad_(self, strength: float) -> Tensor:
        """Add the gradient of strength * penalty to every `.grad`; returns the value (0-dim)."""
        for entry in self.params:
            if entry.grad is None:
                entry.grad = torch.zeros_like(entry)
        params, anchors, importances = self.trained
        grads = [cast("Tensor", entry.grad) for entry in params]
        value = ops.add_quadratic_penalty_grad_(grads, params, anchors, importances, strength)
        for change in self.changes:
            with torch.enable_grad():
                delta = change.delta()
            # G = 2 * strength * F * (W + s B A - anchor); to A goes s B^T G, to B goes s G A^T.
            pull = torch.zeros_like(delta)
            value = value + ops.add_quadratic_penalty_grad_(
                [pull], [delta.detach()], *change.quadratic, strength=strength
            )
            gradients = torch.autograd.grad(delta, change.factors, pull)
            for entry, gradient in zip(change.factors, gradients, strict=True):
                cast("Tensor", entry.grad).add_(gradient)
        return value


def active_layers(model: nn.Module) -> Iterator[tuple[Any, list[str]]]:
    """LoRA's layers, and the adapters of each that act beside its weight now."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and not (layer.disable_adapters or layer.merged):
            adapters = [name for name in layer.active_adapters if name in layer.scaling]
            if adapters:
                yield layer, adapters


def trained_copies(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Parameters that `modules_to_save` trains now in place of others, and these."""
    return [
        pair
        for wrapper in model.modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and not wrapper.disable_adapters
        for name in wrapper.active_adapters
        for pair in zip(
            wrapper.modules_to_save[name].parameters(),
            wrapper.original_module.parameters(),
            strict=True,
        )
    ]


def _adds_a_product(layer: Any) -> bool:
    """Whether this layer of PEFT only adds s B A to the weight of one layer."""
    if not isinstance(layer, LoraLayer) or not hasattr(layer.get_base_layer(), "weight"):
        return False
    return not layer.lora_variant and not any(layer.lora_bias.values())


@contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, the model is as `merge_and_unload` would make it; afterwards to the bit as before."""
    layers, copies = list(active_layers(model)), trained_copies(model)
    changed = [layer.get_base_layer().weight for layer, _ in layers] + [old for _, old in copies]
    before = [entry.detach().clone() for entry in changed]
    flags = [(entry, entry.requires_grad) for entry in model.parameters()]
    wrappers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not (module.disable_adapters or getattr(module, "merged", False))
    ]
    try:
        with torch.no_grad():
            for layer, adapters in layers:
                for name in adapters:
                    layer.get_base_layer().weight += layer.get_delta_weight(name)
            for copy, original in copies:
                original.copy_(copy)
        for module in wrappers:
            module.enable_adapters(False)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(changed, before)
        for module in wrappers:
            module.enable_adapters(True)
        for entry, flag in flags:
            entry.requires_grad_(flag)


@contextmanager
def only_known_trainable(base: QuadraticPenalty) -> Iterator[None]:
    """Inside, what the method knows of its model is trainable, and nothing else."""
    named = canonical_names(dict(base.model.named_parameters()))
    ids, names = set(map(id, base._state.params)), set(base._state.names)
    flags = [(entry, entry.requires_grad) for entry in named.values()]
    try:
        for name, entry in named.items():
            entry.requires_grad_(name in names or id(entry) in ids)
        yield
    finally:
        for entry, flag in flags:
            entry.requires_grad_(flag)
