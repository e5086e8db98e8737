"""clext: continual-learning regularisers as cheap as not using them, and results to trust.

import clext
result = clext.train("rwalk")            # Permuted MNIST, 5 tasks of 10 epochs
print(result)

reg = clext.SI(model)                    # drop-in, for any module and any loop
optimizer = clext.optim.Adam(model.parameters(), lr=1e-3, method=reg)
"""

import importlib
from typing import TYPE_CHECKING, Any

from clext._version import __version__

if TYPE_CHECKING:
    from clext import course, data, importance, methods, ops, optim, reference
    from clext.data.idx import DataError
    from clext.data.scenario import Scenario
    from clext.methods import (
        AGEM,
        DGR,
        EWC,
        GEM,
        MAS,
        METHODS,
        SCP,
        SI,
        Baseline,
        Combined,
        ICaRL,
        Joint,
        LwF,
        Method,
        Replay,
        RWalk,
    )
    from clext.ops._extension import build_info
    from clext.training.compare import Comparison, compare
    from clext.training.loop import NonFiniteLossError, train
    from clext.training.result import Result

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
    "Combined",
    "Comparison",
    "DataError",
    "ICaRL",
    "Joint",
    "LwF",
    "Method",
    "NonFiniteLossError",
    "RWalk",
    "Replay",
    "Result",
    "Scenario",
    "__version__",
    "build_info",
    "compare",
    "course",
    "data",
    "importance",
    "methods",
    "ops",
    "optim",
    "reference",
    "train",
]

# Where the names are that are not from clext.methods: imported when they are first used, so that
# the command line starts without torch.
_PACKAGES = {"course", "data", "importance", "methods", "ops", "optim", "reference"}
_MODULES = {
    "Comparison": "training.compare",
    "DataError": "data.idx",
    "NonFiniteLossError": "training.loop",
    "Result": "training.result",
    "Scenario": "data.scenario",
    "build_info": "ops._extension",
    "compare": "training.compare",
    "train": "training.loop",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in __all__:
        raise AttributeError(f"module 'clext' has no attribute {name!r}")
    if name in _PACKAGES:
        return importlib.import_module(f"clext.{name}")
    module = importlib.import_module(f"clext.{_MODULES.get(name, 'methods')}")
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return __all__
