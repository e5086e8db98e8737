"""The ops of `torch.ops.clext` as typed functions, and what stands in where there is no kernel."""

import clext.ops.torch_library  # noqa: F401  (for its effect)
from clext.ops import reference
from clext.ops.kernels import (
    accumulate_abs_,
    accumulate_path_integral_,
    accumulate_riemannian_walk_score_,
    accumulate_square_,
    add_quadratic_penalty_grad_,
    consolidate_all_anchors_,
    consolidate_importance_,
    consolidate_path_integral_,
    consolidate_riemannian_walk_,
    gradient_gram,
    per_sample_sum,
    project_gradient_,
    quadratic_penalty,
    quadratic_penalty_backward,
    riemannian_walk_step_,
    sliced_importance_,
)

__all__ = [
    "accumulate_abs_",
    "accumulate_path_integral_",
    "accumulate_riemannian_walk_score_",
    "accumulate_square_",
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
    "reference",
    "riemannian_walk_step_",
    "sliced_importance_",
]
