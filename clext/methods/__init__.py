"""The methods, and how to make one by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clext.core.checks import unknown_name
from clext.core.names import part_names
from clext.methods.agem import AGEM
from clext.methods.base import Method, option_names
from clext.methods.baseline import Baseline
from clext.methods.dgr import DGR
from clext.methods.ewc import EWC
from clext.methods.gem import GEM
from clext.methods.icarl import ICaRL
from clext.methods.joint import Joint
from clext.methods.lwf import LwF
from clext.methods.mas import MAS
from clext.methods.replay import Replay
from clext.methods.rwalk import RWalk
from clext.methods.scp import SCP
from clext.methods.si import SI

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

__all__ = [
    "AGEM",
    "DGR",
    "EWC",
    "GEM",
    "MAS",
    "METHODS",
    "SCP",
    "SI",
    "Baseline",
    "ICaRL",
    "Joint",
    "LwF",
    "Method",
    "RWalk",
    "Replay",
    "make_method",
    "part_names",
]

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        *(Baseline, EWC, MAS, SI, RWalk, SCP),
        *(LwF, Replay, ICaRL, DGR, GEM, AGEM, Joint),
    )
}


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
            `Method.combine`), or an instance.
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
                f"make_method: {method.label!r} is an instance already, so {', '.join(given)} "
                "cannot be set here; pass them where it is made"
            )
        if method.model is not model:
            raise ValueError(
                f"make_method: this {method.label!r} instance was made for another model"
            )
        return method
    kinds = [METHODS[name] for name in part_names(method)]
    # Whichever was named first: it is the other one that learns by its own loss.
    kinds.sort(key=lambda kind: kind.learns_otherwise())
    weighed = next((kind for kind in kinds if kind.has_strength), kinds[0])
    shared, of_parts = _sorted_options(kinds, options)
    parts = []
    for kind in kinds:
        own = {name: value for name, value in shared.items() if name in option_names(kind)}
        own |= {"strength": strength} if kind is weighed else {}
        parts.append(kind(model, **{**own, **of_parts[kind.name]}))
    return parts[0] if len(parts) == 1 else parts[0].combine(parts[1])


def _sorted_options(
    kinds: Sequence[type[Method]], options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The options for every part that has them, and those "PART.OPTION" by part.

    ValueError for a name that no part has.
    """
    known = {kind.name: option_names(kind) for kind in kinds}
    shared: dict[str, Any] = {}
    of_parts: dict[str, dict[str, Any]] = {name: {} for name in known}
    for option, value in options.items():
        part, dot, name = option.partition(".")
        if not dot:
            valid = list(dict.fromkeys(name for names in known.values() for name in names))
            if option not in valid:
                raise unknown_name(f"option of {'+'.join(known)}", option, valid)
            shared[option] = value
        elif part not in known:
            raise unknown_name(f"part of {'+'.join(known)} in option {option!r}:", part, known)
        elif name not in known[part]:
            raise unknown_name(f"option of {part}", name, known[part])
        else:
            of_parts[part][name] = value
    return shared, of_parts
