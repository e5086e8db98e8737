"""A method specified: its name or instance, its options, and the model that it works on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clext.core.checks import unknown_name
from clext.core.names import DEFAULT_METHODS, METHOD_OPTIONS, MODELS, part_names
from clext.core.seeding import Seeds, generator
from clext.methods import Method, make_method
from clext.methods.parts.options import option_names
from clext.training.models import ImageModel, hidden_widths, mlp, named_model
from clext.training.settings import check_option_names

if TYPE_CHECKING:
    from clext.data.scenario import Scenario


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


def method_specs(
    owner: str,
    methods: str | Sequence[str | Sequence[str]] | None,
    model: nn.Module | str | None,
    options: Mapping[str, Mapping[str, Any]],
) -> dict[str, MethodSpec]:
    """Each method by its label; ValueError by `owner` for what is none, or options of none."""
    parts = _parts_by_label(owner, methods)
    options = {str(label).lower(): given for label, given in options.items()}
    for label, given in options.items():
        if label not in parts:
            raise unknown_name("method in options", label, parts)
        if not isinstance(given, Mapping):
            raise ValueError(
                f"{owner}: options of {label!r} must be a dict, such as {{'strength': 100.0}}, got "
                f"{given!r}"
            )
    specs = {}
    for label, names in parts.items():
        own = dict(options.get(label, {}))
        specs[label] = MethodSpec(names, model, own.pop("strength", None), own)
    return specs


def _parts_by_label(
    owner: str,
    methods: str | Sequence[str | Sequence[str]] | None,
) -> dict[str, list[str]]:
    """The names in each entry of `methods`; ValueError for what has none."""
    if isinstance(methods, str):
        methods = methods.split(",")
    elif not isinstance(methods, Iterable):
        methods = DEFAULT_METHODS if methods is None else [methods]
    parts: dict[str, list[str]] = {}
    for entry in methods:
        if not isinstance(entry, str | Sequence):
            raise ValueError(
                f"{owner}: methods must be a list of names, such as ['ewc', 'si'], got {entry!r}; "
                "pass the settings of a method in options"
            )
        names = part_names(entry)
        label = entry.strip().lower() if isinstance(entry, str) else "+".join(names)
        if label in parts:
            raise ValueError(f"{owner}: method {label!r} is given twice; name each method once")
        parts[label] = names
    if not parts:
        raise ValueError(
            f"{owner}: expected at least one method, got none; choose from {[*METHOD_OPTIONS]}"
        )
    return parts


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
            f"{type(model).__name__}; leave it out to train a perceptron, 'mlp'"
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "train: model has no trainable parameter; set requires_grad on what should learn"
        )
