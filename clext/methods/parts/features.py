"""What goes into one layer of a model: the features that its head works on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.modes import module_mode, run_eagerly

if TYPE_CHECKING:
    from collections.abc import Callable

    from clext.methods.learning import Learning


class Features:
    """Reads the input of one layer while the model runs.

    Args:
        method: of whose model.
        layer: the layer's name in the model; None: the nn.Linear that makes the model's outputs,
            which is looked for when features are first asked for.

    Raises:
        ValueError: the model has layers, and none of that name.
    """

    def __init__(self, method: Learning, layer: str | None) -> None:
        self._method, self._layer = method, layer
        # Options are also checked on a stand-in for the model, which has no layers.
        if layer is not None and any(True for _ in method.model.children()):
            self._named(layer)

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Features [N, size] and all logits [N, outputs] of `inputs`, in the model's mode.

        Raises:
            ValueError: there is no such layer, or it gets no tensor with a row for each example.
        """
        model, owner, layer = self._method.model, self._method.name, self._named(self.find(inputs))
        seen: list[object] = []
        hook = layer.register_forward_pre_hook(lambda _layer, args: seen.extend(args[:1]))
        try:
            with self._method.outputs.full(), run_eagerly():
                logits: Tensor = model(inputs)
        finally:
            hook.remove()
        found = seen[-1] if seen else None
        if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != len(inputs):
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"{owner}: layer '{self._layer}' gets {got} for {len(inputs)} examples, "
                "expected a tensor with a row for each; name another layer with features="
            )
        return found.flatten(1) if found.dim() > 1 else found.unsqueeze(1), logits

    def find(self, inputs: Tensor) -> str:
        """The name of the layer; ValueError if there is no such."""
        if self._layer is None:
            self._layer = self._head(inputs[:2])
        return self._layer

    def _named(self, name: str) -> nn.Module:
        """The layer of that name; ValueError if there is none."""
        model = self._method.model
        try:
            return model.get_submodule(name)
        except AttributeError:
            names = [known for known, _ in model.named_modules() if known]
            raise ValueError(
                f"{self._method.name}: the model has no layer '{name}'; features must be one of "
                f"{', '.join(names) or 'its layers, and it has none'}"
            ) from None

    @torch.no_grad()
    def _head(self, inputs: Tensor) -> str:
        """The name of the nn.Linear whose result the model returns."""
        model, made = self._method.model, dict[str, object]()

        def note(name: str) -> Callable[[nn.Module, object, object], None]:
            return lambda _layer, _args, result: made.update({name: result})

        layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        hooks = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
        try:
            with self._method.outputs.full(), module_mode(model, training=False), run_eagerly():
                logits = model(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        heads = [name for name, result in made.items() if result is logits]
        if not heads:
            raise ValueError(
                f"{self._method.name}: no nn.Linear makes the outputs of {type(model).__name__} by "
                "itself; name the layer whose input is to be taken with features="
            )
        return heads[-1]
