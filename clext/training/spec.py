"""Which method on which model: checked as asked for, built once the data is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clext.core.modes import module_mode
from clext.methods import METHODS, Method, make_method, part_names
from clext.methods.base import option_names
from clext.training.models import mlp

if TYPE_CHECKING:
    from clext.data.scenarios import Scenario
    from clext.methods.learning import Learning


@dataclass(frozen=True)
class LearnerSpec:
    """A method, by name(s) or as an instance, with its options, and the model it works on."""

    method: str | Sequence[str] | Method
    model: nn.Module | None = None
    strength: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, scenario: Scenario | None = None) -> None:
        """ValueError if the method, its options or the model are wrong; nothing is built.

        And with a scenario, if the method cannot learn all of its tasks.
        """
        # The methods know their own options, so let one check them, on a stand-in for the model
        # (nn.Linear would draw its weights from the global random state).
        stand_in = nn.ParameterList([nn.Parameter(torch.zeros(1))])
        model = self.method.model if isinstance(self.method, Method) else stand_in
        if self.model is not None:
            _check_model(self.model)
            model = self.model if isinstance(self.method, Method) else model
        made = make_method(self.method, model, strength=self.strength, **self.options)
        if scenario is not None:
            classes = [task.classes for task in scenario.tasks]
            for part in made.parts:
                part.check_classes(classes)

    def build(self, scenario: Scenario, device: torch.device, seed: int) -> Method:
        """The method on its model, on `device`. A model of our own takes the global random state.

        Raises ValueError if a given model does not turn examples into enough logits.
        """
        if isinstance(self.method, Method):
            model = self.method.model
        else:
            model = _perceptron(scenario) if self.model is None else self.model
        model.to(device)
        _check_forward(model, scenario, device)
        if isinstance(self.method, Method):
            return self.method.to(device)
        kinds = [METHODS[name] for name in part_names(self.method)]
        seeded = any("seed" in option_names(kind) for kind in kinds)
        own_seed = {"seed": seed} if seeded else {}
        return make_method(
            self.method, model, strength=self.strength, **{**own_seed, **self.options}
        )


def describe_learner(method: Method) -> dict[str, Any]:
    """What a result records about its method and model."""
    model = method.model
    options = {part.name: _options(part) for part in method.parts}
    if len(options) > 1:
        for part in method.parts:
            options[part.name] |= {"strength": part.strength} if part.has_strength else {}
    return {
        "method": method.label,
        "strength": next((p.strength for p in method.parts if p.has_strength), None),
        "method_options": options[method.name] if len(options) == 1 else options,
        "model": _describe_model(model),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _options(part: Learning) -> dict[str, Any]:
    """What the method was made with, but for its strength and modules, as JSON values."""
    values = {name: getattr(part, name) for name in option_names(type(part)) if name != "strength"}
    return {
        name: type(value).__name__ if isinstance(value, nn.Module) else value
        for name, value in values.items()
    }


def _perceptron(scenario: Scenario) -> nn.Module:
    """The course's perceptron for the scenario's examples."""
    shape = scenario.input_shape
    model = mlp(math.prod(shape), scenario.num_outputs)
    return model if len(shape) == 1 else nn.Sequential(nn.Flatten(), *model)


def input_dtype(model: nn.Module) -> torch.dtype:
    """The type of the model's first trainable parameter, which its inputs should have as well."""
    return next(p.dtype for p in model.parameters() if p.requires_grad)


def _describe_model(model: nn.Module) -> str:
    """The widths of a plain perceptron, else the name of the class."""
    if type(model) is nn.Sequential and all(
        isinstance(m, nn.Linear | nn.ReLU | nn.Flatten) for m in model
    ):
        layers = [layer for layer in model if isinstance(layer, nn.Linear)]
        widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
        return f"MLP {'-'.join(str(width) for width in widths)}"
    return type(model).__name__


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"train: model must be a torch.nn.Module, got {type(model).__name__}; "
            "leave it out to train the course's perceptron"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "train: model has no trainable parameter; set requires_grad on what should learn"
        )


def _check_forward(model: nn.Module, scenario: Scenario, device: torch.device) -> None:
    """Try the model on two examples: a shape error in the first step would name no argument."""
    stored, outputs = scenario.tasks[0].stored_train.inputs, scenario.num_outputs
    dtype = input_dtype(model) if stored.is_floating_point() else stored.dtype
    probe = torch.zeros(2, *scenario.input_shape, device=device, dtype=dtype)
    shape = ", ".join(["N", *map(str, scenario.input_shape)])
    expected = f"inputs [{shape}] into logits [N, {outputs}]"
    remedy = "begin it with nn.Unflatten if it takes images"
    if not stored.is_floating_point():
        remedy = f"the inputs are {stored.dtype}: pass inputs.float() if it takes numbers"
    try:
        with torch.no_grad(), module_mode(model, training=False):
            logits = model(probe)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"train: model must turn {expected}, but failed on such inputs ({error}); {remedy}"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < outputs:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"train: model must turn {expected}, got {got} for N = 2")
