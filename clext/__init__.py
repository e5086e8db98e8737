"""clext: continual-learning regularisers as cheap as not using them, and results to trust.

import clext
result = clext.train("rwalk")            # Permuted MNIST, 5 tasks of 10 epochs
print(result)

reg = clext.SI(model)                    # drop-in, for any module and any loop
optimizer = clext.optim.Adam(model.parameters(), lr=1e-3, method=reg)
"""

import importlib
from typing import TYPE_CHECKING, Any

from clext._version import __version__ as __version__

if TYPE_CHECKING:
    from clext import course as course
    from clext import data as data
    from clext import importance as importance
    from clext import methods as methods
    from clext import ops as ops
    from clext import optim as optim
    from clext import reference as reference
    from clext.core.supervision import Supervision as Supervision
    from clext.data.idx import DataError as DataError
    from clext.data.scenario import Scenario as Scenario
    from clext.methods import AGEM as AGEM
    from clext.methods import DER as DER
    from clext.methods import DGR as DGR
    from clext.methods import ERACE as ERACE
    from clext.methods import EWC as EWC
    from clext.methods import GEM as GEM
    from clext.methods import KFAC as KFAC
    from clext.methods import L2 as L2
    from clext.methods import MAS as MAS
    from clext.methods import METHODS as METHODS
    from clext.methods import SCP as SCP
    from clext.methods import SI as SI
    from clext.methods import Baseline as Baseline
    from clext.methods import Combined as Combined
    from clext.methods import DERpp as DERpp
    from clext.methods import ICaRL as ICaRL
    from clext.methods import Joint as Joint
    from clext.methods import LwF as LwF
    from clext.methods import Method as Method
    from clext.methods import Replay as Replay
    from clext.methods import RWalk as RWalk
    from clext.ops._extension import build_info as build_info
    from clext.training.callbacks import Callback as Callback
    from clext.training.callbacks import StopTraining as StopTraining
    from clext.training.compare import compare as compare
    from clext.training.comparison import Comparison as Comparison
    from clext.training.loop import NonFiniteLossError as NonFiniteLossError
    from clext.training.result import Result as Result
    from clext.training.sweep import sweep as sweep
    from clext.training.sweep_result import Sweep as Sweep
    from clext.training.train import train as train

# Imported when they are first used, so that the command line starts without torch.
_PACKAGES = ("course", "data", "importance", "methods", "ops", "optim", "reference")
_NAMES = {
    "methods": "AGEM DER DGR ERACE EWC GEM KFAC L2 MAS METHODS SCP SI Baseline Combined DERpp "
    "ICaRL Joint LwF Method Replay RWalk",
    "core.supervision": "Supervision",
    "data.idx": "DataError",
    "data.scenario": "Scenario",
    "ops._extension": "build_info",
    "training.callbacks": "Callback StopTraining",
    "training.compare": "compare",
    "training.comparison": "Comparison",
    "training.loop": "NonFiniteLossError",
    "training.result": "Result",
    "training.sweep": "sweep",
    "training.sweep_result": "Sweep",
    "training.train": "train",
}
_PLACES = {name: place for place, names in _NAMES.items() for name in names.split()}
__all__ = ["__version__", *_PACKAGES, *_PLACES]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _PACKAGES:
        return importlib.import_module(f"clext.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module 'clext' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"clext.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
