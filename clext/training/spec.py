"""A method specified: its name or instance, its options, and the model that it works on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clext.core.inputs import described, one_tensor, taken
from clext.core.modes import module_mode
from clext.core.names import METHOD_OPTIONS, MODELS, part_names
from clext.core.seeding import Seeds, generator
from clext.data.datasets import as_numbers
from clext.data.loaders import LoaderTask
from clext.methods import Method, make_method
from clext.methods.parts.options import option_names
from clext.training.models import ImageModel, hidden_widths, mlp, named_model
from clext.training.settings import check_option_names

if TYPE_CHECKING:
    from clext.core.inputs import Inputs
    from clext.data.scenario import Scenario
    from clext.data.task import Task
    from clext.training.augmentation import Transform


@dataclass(frozen=True)
class MethodSpec:
    """What is to be trained."""

    method: str | Sequence[str] | Method
    model: nn.Module | str | None = None
    strength: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def makes_model(self) -> bool:
        """Whether the model is one of our own."""
        return not isinstance(self.model, nn.Module) and not isinstance(self.method, Method)

    def build(self, seeds: Seeds, scenario: Scenario | None = None) -> Method:
        """The method on its model; ValueError if the method, an option or the model is wrong.

        While there is no scenario yet, a model of our own is the course's, for MNIST; that is also
        how options are checked before the data is loaded. It leaves the global random state alone.
        """
        _check_model(self.model)
        if isinstance(self.method, Method):
            if isinstance(self.model, str):
                raise ValueError(
                    f"train: model={self.model!r}, but the given method has a model; leave it out"
                )
            own = [name for part in self.method.parts for name in option_names(type(part))]
            check_option_names(self.method.name, self.options, own)
            model = self.method.model if self.model is None else self.model
            return make_method(self.method, model, strength=self.strength, **self.options)
        names = part_names(self.method)
        known = [option for name in names for option in METHOD_OPTIONS[name]]
        check_option_names("+".join(names), self.options, known)
        model = self.model if isinstance(self.model, nn.Module) else self._make(seeds, scenario)
        options = {"seed": seeds.method} if "seed" in known else {}
        return make_method(names, model, strength=self.strength, **{**options, **self.options})

    def _make(self, seeds: Seeds, scenario: Scenario | None) -> nn.Module:
        if scenario is None:
            return mlp(random=generator(seeds.model))
        name = self.model if isinstance(self.model, str) else "mlp"
        return named_model(name, scenario.input_shape, scenario.num_outputs, seeds.model)

    def fits(self, method: Method, scenario: Scenario) -> bool:
        """Whether a model of our own is the one that the scenario needs."""
        if not self.makes_model:
            return True
        if self.model not in (None, "mlp"):
            return isinstance(method.model, ImageModel)
        widths = _widths(method.model)
        return widths[:1] + widths[-1:] == [math.prod(scenario.input_shape), scenario.num_outputs]


def check_forward(
    method: Method, scenario: Scenario, device: torch.device, transform: Transform | None = None
) -> None:
    """Try them on two examples: an error in the first step would name no argument."""
    outputs, shape = scenario.num_outputs, ""
    inputs, remedy = _probe(method, scenario.tasks[0], device)
    if isinstance(inputs, Tensor):
        shape = f" [{', '.join(['N', *map(str, inputs.shape[1:])])}]"
    expected = f"inputs{shape} into logits [N, {outputs}]"
    if transform is not None:
        _check_transform(inputs, transform)
    try:
        with torch.no_grad(), module_mode(method.model, training=False):
            logits = method.heads.outputs(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"train: model must turn {expected}, but failed on such inputs ({error}); {remedy}"
        ) from error
    if logits.dim() != 2 or logits.shape[1] < outputs:
        raise ValueError(f"train: model must turn {expected}, got {list(logits.shape)} for N = 2")


def _probe(method: Method, task: Task | LoaderTask, device: torch.device) -> tuple[Inputs, str]:
    """Two examples as the model is given them, and what to do if it does not take them."""
    read = method.heads.inputs_and_labels
    if isinstance(task, LoaderTask):
        with closing(task.to(device).test_batches(read)) as batches:
            inputs, _ = read(next(batches))
        return taken(inputs, slice(2)), "forward= of the method says how to call it"
    stored = as_numbers(task.stored_train.inputs[:1], input_dtype(method.model))
    probe = torch.zeros(2, *task.input_shape, device=device, dtype=stored.dtype)
    remedy = "begin it with nn.Unflatten if it takes images"
    if not stored.is_floating_point():
        remedy = (
            f"the inputs are {stored.dtype}: pass inputs.float() if they are numbers, begin the "
            "model with nn.EmbeddingBag if they are tokens"
        )
    inputs, _ = read((probe, torch.zeros(2, dtype=torch.int64, device=device)))
    return inputs, remedy


def _check_transform(probe: Inputs, transform: Transform) -> None:
    """ValueError if two examples are not alike any more."""
    expected = f"train: transform must keep shape and type of two examples {described(probe)}"
    remedy = "evaluation shows the model plain ones; for others change the data"
    try:
        found = transform(one_tensor("train: transform", probe))
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"{expected}, but failed ({error}); {remedy}") from error
    if described(found) != described(probe):
        raise ValueError(f"{expected}, got {described(found)}; {remedy}")


def input_dtype(model: nn.Module) -> torch.dtype:
    """The type of the model's first trainable parameter, which its inputs should have as well."""
    return next(p.dtype for p in model.parameters() if p.requires_grad)


def describe(method: Method) -> dict[str, Any]:
    """What a result records about its method and model, as JSON values."""
    model = method.model
    options = {part.name: _options(part) for part in method.parts}
    if len(options) > 1:
        for part in method.parts:
            options[part.name] |= {"strength": part.strength} if part.has_strength else {}
    return {
        "method": method.name,
        "strength": next((p.strength for p in method.parts if p.has_strength), None),
        "method_options": options[method.name] if len(options) == 1 else options,
        "model": _describe_model(model),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def _options(part: Any) -> dict[str, Any]:  # noqa: ANN401
    """What the method was made with, but for its strength; of modules the name of the class."""
    names = (name for name in option_names(type(part)) if name != "strength")
    return {name: _plain(getattr(part, name)) for name in names}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, nn.Module):
        return type(value).__name__
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _describe_model(model: nn.Module) -> str:
    """The widths of a plain perceptron, the name of a model that has one, else of the class."""
    if isinstance(model, ImageModel):
        return model.name
    plain = type(model) is nn.Sequential and all(
        isinstance(m, nn.Linear | nn.ReLU | nn.Flatten) for m in model
    )
    return f"MLP {'-'.join(map(str, _widths(model)))}" if plain else type(model).__name__


def _widths(model: nn.Module) -> list[int]:
    layers = [layer for layer in model.children() if isinstance(layer, nn.Linear)]
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def _check_model(model: nn.Module | str | None) -> None:
    if model is None:
        return
    if isinstance(model, str):
        hidden_widths(model)
        return
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"train: model must be a torch.nn.Module or a name ({', '.join(MODELS)}), got "
            f"{type(model).__name__}; leave it out to train the course's perceptron"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "train: model has no trainable parameter; set requires_grad on what should learn"
        )
