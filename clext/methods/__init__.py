"""The methods, and how to make one by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clext.core.checks import unknown_name
from clext.core.names import part_names
from clext.methods.agem import AGEM
from clext.methods.base import Method
from clext.methods.baseline import Baseline
from clext.methods.combined import Combined
from clext.methods.der import DER, DERpp
from clext.methods.dgr import DGR
from clext.methods.er_ace import ERACE
from clext.methods.ewc import EWC
from clext.methods.gem import GEM
from clext.methods.icarl import ICaRL
from clext.methods.joint import Joint
from clext.methods.kfac import KFAC
from clext.methods.l2 import L2
from clext.methods.lwf import LwF
from clext.methods.mas import MAS
from clext.methods.parts.options import option_names
from clext.methods.replay import Replay
from clext.methods.rwalk import RWalk
from clext.methods.scp import SCP
from clext.methods.si import SI

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = [
    "AGEM",
    "DER",
    "DGR",
    "ERACE",
    "EWC",
    "GEM",
    "KFAC",
    "L2",
    "MAS",
    "METHODS",
    "SCP",
    "SI",
    "Baseline",
    "Combined",
    "DERpp",
    "ICaRL",
    "Joint",
    "LwF",
    "Method",
    "RWalk",
    "Replay",
    "make_method",
    "part_names",
]

_KINDS = (
    *(Baseline, L2, EWC, KFAC, MAS, SI, RWalk, SCP),
    *(LwF, Replay, DER, DERpp, ERACE, ICaRL, DGR, GEM, AGEM, Joint),
)
METHODS: dict[str, type[Method]] = {kind.name: kind for kind in _KINDS}


def make_method(
    method: str | Sequence[str] | Method,
    model: nn.Module,
    *,
    strength: float | None = None,
    **options: Any,  # noqa: ANN401  (each method has its own)
) -> Method:
    """The method of that name on `model`; an instance made for `model` is returned as it is.

    Args:
        method: a name in `METHODS`, two of them to combine (["ewc", "replay"] or "ewc+replay", see
            `Combined`), or an instance.
        model: the model to protect.
        strength: weight of the penalty; by default the method's own. In a combination it is that of
            the method with a penalty, else that of the other.
        **options: options of the method, such as `xi` of "si". In a combination an option goes to
            each of the two that has it, and "PART.OPTION", such as "replay.strength", to that part
            alone, whatever is given without the part's name.

    Raises:
        ValueError: an unknown method or option (with the nearest valid name), a bad value, a
            strength for a method without one, two methods that do not combine, an instance of
            another model or given together with options.
    """
    if isinstance(method, Method):
        given = [*options] if strength is None else ["strength", *options]
        if given:
            raise ValueError(
                f"make_method: {method.name!r} is an instance already, so {', '.join(given)} "
                "cannot be set here; pass them where it is made"
            )
        if method.model is not model:
            raise ValueError(
                f"make_method: this {method.name!r} instance was made for another model"
            )
        return method
    # Whichever was named first: it is the other one that learns by its own loss.
    kinds = sorted(
        (METHODS[name] for name in part_names(method)), key=lambda kind: kind.has_own_loss
    )
    own = _options_of(kinds, options)
    if strength is not None:
        weighed = next((kind for kind in kinds if kind.has_strength), kinds[0])
        own[weighed.name].setdefault("strength", strength)
    parts = [kind(model, **own[kind.name]) for kind in kinds]
    return parts[0] if len(parts) == 1 else Combined(*parts)


def _options_of(
    kinds: Sequence[type[Method]], options: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """The options of each part, by its name; ValueError for one that no part has."""
    known = {kind.name: option_names(kind) for kind in kinds}
    own: dict[str, dict[str, Any]] = {part: {} for part in known}
    # "PART.OPTION" last: it takes the place of what is given for both.
    for option, value in sorted(options.items(), key=lambda item: "." in item[0]):
        part, dot, name = option.rpartition(".")
        if dot and part not in known:
            raise unknown_name(f"part of {'+'.join(known)} in option {option!r}:", part, known)
        valid = {part: known[part]} if dot else known
        having = [part for part, names in valid.items() if name in names]
        if not having:
            names = dict.fromkeys(name for names in valid.values() for name in names)
            raise unknown_name(f"option of {'+'.join(valid)}", name, names)
        for part in having:
            own[part][name] = value
    return own
