"""clext: continual-learning regularisers as cheap as not using them, and results to trust.

import clext
result = clext.train("rwalk")            # Permuted MNIST, 5 tasks of 10 epochs
print(result)

reg = clext.SI(model)                    # drop-in, for any module and any loop
optimizer = clext.optim.Adam(model.parameters(), lr=1e-3, method=reg)
"""

from clext import course, ops, optim
from clext._version import __version__
from clext.data.datasets import DataError
from clext.data.scenarios import Scenario
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
    ICaRL,
    Joint,
    LwF,
    Method,
    Replay,
    RWalk,
)
from clext.ops import reference
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
    "ops",
    "optim",
    "reference",
    "train",
]
