"""The methods, and how to make one by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clext.methods.base import Method, option_names
from clext.methods.baseline import Baseline
from clext.methods.ewc import EWC
from clext.methods.mas import MAS
from clext.methods.rwalk import RWalk
from clext.methods.scp import SCP
from clext.methods.si import SI
from clext.options import unknown_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["EWC", "MAS", "METHODS", "SCP", "SI", "Baseline", "Method", "RWalk", "make_method"]

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Baseline, EWC, MAS, SI, RWalk, SCP)
}


def make_method(
    method: str | Method,
    model: nn.Module,
    *,
    strength: float | None = None,
    **options: Any,  # noqa: ANN401  (each method has its own)
) -> Method:
    """The method of that name on `model`; an instance made for `model` is returned as it is.

    Args:
        method: a name in `METHODS`, or an instance.
        model: the model to protect.
        strength: weight of the penalty; by default the method's own.
        **options: options of the method, such as `xi` of "si".

    Raises:
        ValueError: an unknown method or option (with the nearest valid name), a bad value, an
            instance of another model or given together with options.
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
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    kind = METHODS[method]
    known = option_names(kind)
    for option in options:
        if option not in known:
            raise unknown_name(f"option of {method}", option, known)
    return kind(model, strength=strength, **options)
