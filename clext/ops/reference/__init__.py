"""Every op in plain torch: the tests' oracle, the fallback for other devices, the bench baseline.

The functions have the signatures of the ops in `clext.ops`, and none of their checks. State
(importance, anchor, path, ...) is float32, or float64 for float64 parameters; lower precisions are
widened before any arithmetic, as the kernels do.
"""

from clext.ops.reference.importance import (
    accumulate_abs_,
    accumulate_square_,
    consolidate_all_anchors_,
    consolidate_importance_,
    sliced_importance_,
)
from clext.ops.reference.optim import adam_step_, sgd_step_
from clext.ops.reference.path import (
    accumulate_path_integral_,
    accumulate_riemannian_walk_score_,
    consolidate_path_integral_,
    consolidate_riemannian_walk_,
    riemannian_walk_step_,
)
from clext.ops.reference.penalty import (
    add_quadratic_penalty_grad_,
    quadratic_penalty,
    quadratic_penalty_backward,
)
from clext.ops.reference.per_sample import per_sample_sum
from clext.ops.reference.projection import gradient_gram, project_gradient_

__all__ = [
    "accumulate_abs_",
    "accumulate_path_integral_",
    "accumulate_riemannian_walk_score_",
    "accumulate_square_",
    "adam_step_",
    "add_quadratic_penalty_grad_",
    "consolidate_all_anchors_",
    "consolidate_importance_",
    "consolidate_path_integral_",
    "consolidate_riemannian_walk_",
    "gradient_gram",
    "per_sample_sum",
    "project_gradient_",
    "quadratic_penalty",
    "quadratic_penalty_backward",
    "riemannian_walk_step_",
    "sgd_step_",
    "sliced_importance_",
]
