"""Importance of parameters for the data of a task: Fisher, MAS and SCP estimates.

Each estimate leaves the model as it was, gradients, buffers, training flags and random state
included, and is the same however the data is split into batches (but for the "batch" kinds).
Parameters that a rule covers, of a layer (`rules`, `register_rule`) or of a node of autograd's
graph (`nodes`), take one backward pass; others are differentiated sample by sample, and a
SlowImportanceWarning names them.
"""

from clext.importance.fallback import SlowImportanceWarning
from clext.importance.fisher import FISHER_KINDS, fisher_information
from clext.importance.kronecker import KRONECKER_KINDS, LayerFactors, kronecker_factors
from clext.importance.mas import MAS_ESTIMATORS, output_sensitivity
from clext.importance.rule import LayerRule
from clext.importance.rules import register_rule
from clext.importance.scp import sliced_cramer_importance
from clext.importance.second_moment import second_moment

__all__ = [
    "FISHER_KINDS",
    "KRONECKER_KINDS",
    "MAS_ESTIMATORS",
    "LayerFactors",
    "LayerRule",
    "SlowImportanceWarning",
    "fisher_information",
    "kronecker_factors",
    "output_sensitivity",
    "register_rule",
    "second_moment",
    "sliced_cramer_importance",
]
