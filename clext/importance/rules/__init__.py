"""Layer rules, one for each type: gradients of single samples from input and output gradient.

What they have in common is in rule.py. A new layer needs a class like those in this folder and an
entry in RULES; from outside, `register_rule` makes it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from clext.importance.rule import LayerRule
from clext.importance.rules.embeddings import EmbeddingRule
from clext.importance.rules.norms import (
    BatchNormRule,
    GroupNormRule,
    InstanceNormRule,
    LayerNormRule,
    RMSNormRule,
)
from clext.importance.rules.products import ConvRule, ConvTransposedRule, LinearRule

if TYPE_CHECKING:
    from typing import Any

RULES: dict[type[nn.Module], type[LayerRule]] = {
    nn.Linear: LinearRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
    nn.ConvTranspose1d: ConvTransposedRule,
    nn.ConvTranspose2d: ConvTransposedRule,
    nn.ConvTranspose3d: ConvTransposedRule,
    nn.Embedding: EmbeddingRule,
    nn.BatchNorm1d: BatchNormRule,
    nn.BatchNorm2d: BatchNormRule,
    nn.BatchNorm3d: BatchNormRule,
    nn.InstanceNorm1d: InstanceNormRule,
    nn.InstanceNorm2d: InstanceNormRule,
    nn.InstanceNorm3d: InstanceNormRule,
    nn.GroupNorm: GroupNormRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
}

# What a subclass must have inherited for the rule of the type above it: all that computes.
_COMPUTING = ("forward", "_conv_forward")


def register_rule(layer_type: type[nn.Module], rule: type[LayerRule]) -> None:
    """From now on the importance of layers of `layer_type` is measured by `rule`.

    For layers of your own whose parameters, named `weight` and `bias`, are used in their `forward`
    alone. A rule that is wrong makes an estimate slow, not wrong: it is compared with autograd on
    the first batch, and left out where it does not agree.

    Args:
        layer_type: the layer's class. Subclasses that inherit its `forward` have the rule too.
        rule: a subclass of `LayerRule`; one of `clext.importance.rules` where the layer computes
            what a layer of torch does. None before is kept: the last one registered counts.

    Raises:
        ValueError: they are no such classes.
    """
    for name, given, base in (("layer_type", layer_type, nn.Module), ("rule", rule, LayerRule)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise ValueError(
                f"register_rule: {name} must be a subclass of {base.__name__}, got {given!r}; "
                "pass the class, not an object of it"
            )
    RULES[layer_type] = rule


def rule_for(layer: nn.Module) -> LayerRule | None:
    """The rule of the layer's type, or of the nearest type above it that computes the same."""
    own: Any = type(layer)
    for base in own.__mro__:
        if base in RULES:
            inherited = all(
                getattr(own, name, None) is getattr(base, name, None) for name in _COMPUTING
            )
            made = RULES[base](layer)
            return made if inherited and made.holds() else None
    return None
