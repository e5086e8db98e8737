"""One registry of every op: its arguments, valid and invalid numbers, and examples by hand.

A new op is one entry of `OPS`: the tests of its values, layouts, bits, gradients, errors and schema
follow from it.
"""

from __future__ import annotations

import torch
from op_arguments import (
    NAN,
    ROWS,
    SLICES,
    Example,
    Fixed,
    ListArg,
    Op,
    TensorArg,
    above_zero,
    anchors,
    at_least_zero,
    fraction,
    grads,
    importances,
    params,
    state,
    weights,
)
from step_registry import STEPS

_STEP = {"params": 2.5, "starts": 2.0, "task_grads": 3.0}

OPS = (
    Op(
        "quadratic_penalty",
        (params(), anchors(), importances()),
        (Example({"params": 3.0, "anchors": 1.0, "importances": 0.5}, {"returns": 2.0}),),
    ),
    Op(
        "quadratic_penalty_backward",
        (TensorArg("grad", ()), params(), anchors(), importances()),
        (
            Example(
                {"grad": 3.0, "params": 3.0, "anchors": 1.0, "importances": 0.5}, {"returns": 6.0}
            ),
        ),
    ),
    Op(
        "add_quadratic_penalty_grad_",
        (
            grads("update"),
            params(),
            anchors(),
            importances(),
            at_least_zero("strength", 0.75),
        ),
        (
            Example(
                {
                    "grads": 10.0,
                    "params": 3.0,
                    "anchors": 1.0,
                    "importances": 0.5,
                    "strength": 0.25,
                },
                {"grads": 10.5, "returns": 0.5},
            ),
        ),
    ),
    Op(
        "accumulate_path_integral_",
        (state("path", "update"), params(), state("starts"), state("task_grads")),
        (Example({"path": 1.0, **_STEP}, {"path": -0.5}),),
    ),
    Op(
        "riemannian_walk_step_",
        (
            state("path", "update"),
            weights("fisher", "update"),
            params(),
            state("starts"),
            state("task_grads"),
            fraction("decay", 0.9),
        ),
        (
            Example(
                {"path": 1.0, "fisher": 8.0, **_STEP, "decay": 0.75}, {"path": -0.5, "fisher": 8.25}
            ),
        ),
    ),
    Op(
        "accumulate_riemannian_walk_score_",
        (
            weights("task_score", "update"),
            state("path", "update"),
            state("interval_start", "update"),
            weights("fisher"),
            params(),
            above_zero("eps", 0.125),
        ),
        (
            Example(
                {
                    "task_score": [1.0, 1.0],
                    "path": [6.0, -6.0],
                    "interval_start": [1.0, 1.0],
                    "fisher": [4.0, 4.0],
                    "params": [2.0, 2.0],
                    "eps": 1.0,
                },
                {"task_score": [3.0, 1.0], "path": [0.0, 0.0], "interval_start": [2.0, 2.0]},
            ),
        ),
    ),
    Op(
        "accumulate_square_",
        (weights("acc", "update"), grads(), at_least_zero("scale", 0.75)),
        (Example({"acc": 1.0, "grads": -3.0, "scale": 0.5}, {"acc": 5.5}),),
        layout="acc",
    ),
    Op(
        "accumulate_abs_",
        (weights("acc", "update"), grads(), at_least_zero("scale", 0.75)),
        (Example({"acc": [1.0, 1.0], "grads": [-3.0, 2.0], "scale": 0.5}, {"acc": [2.5, 2.0]}),),
        layout="acc",
    ),
    Op(
        "sliced_importance_",
        (
            weights("acc", "update"),
            ListArg("jacobian", "rows"),
            TensorArg("slices", (SLICES, ROWS)),
            at_least_zero("scale", 0.75),
        ),
        (
            Example(
                {
                    "acc": [1.0],
                    "jacobian": [[2.0], [3.0]],
                    "slices": [[1.0, 0.0], [1.0, -1.0]],
                    "scale": 0.5,
                },
                {"acc": [3.5]},
            ),
        ),
        layout="acc",
        mixed_dtypes=False,
    ),
    Op(
        "gradient_gram",
        (ListArg("rows", "rows"), grads()),
        (
            Example(
                {"rows": [[2.0], [3.0]], "grads": [5.0]},
                {"returns": [[4.0, 6.0, 10.0], [6.0, 9.0, 15.0], [10.0, 15.0, 25.0]]},
            ),
        ),
        layout="grads",
        returns=(ROWS + 1, ROWS + 1),
        returns_double=True,
    ),
    Op(
        "project_gradient_",
        (
            grads("update"),
            ListArg("rows", "rows"),
            TensorArg("weights", (ROWS,), dtype=torch.float64),
        ),
        (
            Example(
                {"grads": [1.0], "rows": [[2.0], [3.0]], "weights": [0.5, -1.0]}, {"grads": [-1.0]}
            ),
            # What has no weight is not read.
            Example(
                {"grads": [1.0], "rows": [[2.0], [NAN]], "weights": [0.5, 0.0]}, {"grads": [2.0]}
            ),
        ),
        layout="grads",
    ),
    Op(
        "consolidate_importance_",
        (
            importances("update"),
            anchors("write"),
            weights("estimate"),
            params(),
            fraction("gamma", 0.75),
        ),
        (
            Example(
                {"importances": 2.0, "anchors": 9.0, "estimate": 3.0, "params": 5.0, "gamma": 0.5},
                {"importances": 4.0, "anchors": 5.0},
            ),
        ),
    ),
    Op(
        "consolidate_all_anchors_",
        (
            importances("update"),
            anchors("update"),
            weights("estimate"),
            params(),
            fraction("gamma", 0.75),
        ),
        (
            Example(
                {
                    "importances": [2.0, 0.0],
                    "anchors": [1.0, 1.0],
                    "estimate": [3.0, 0.0],
                    "params": [5.0, 5.0],
                    "gamma": 0.5,
                },
                {"importances": [4.0, 0.0], "anchors": [4.0, 5.0], "returns": 12.0},
            ),
        ),
    ),
    Op(
        "consolidate_path_integral_",
        (
            importances("update"),
            anchors("update"),
            state("path", "update"),
            params(),
            above_zero("xi", 0.125),
            Fixed("clamp_total", False),
        ),
        (
            Example(
                {
                    "importances": [1.0, 1.0],
                    "anchors": [2.0, 2.0],
                    "path": [3.0, -3.0],
                    "params": [3.0, 3.0],
                    "xi": 0.5,
                },
                {"importances": [3.0, 1.0], "anchors": [3.0, 3.0], "path": [0.0, 0.0]},
            ),
        ),
    ),
    Op(
        "consolidate_path_integral_",
        (
            importances("update"),
            anchors("update"),
            state("path", "update"),
            params(),
            above_zero("xi", 0.125),
            Fixed("clamp_total", True),
        ),
        (
            # A task takes away what it has made worse, and no more than there is.
            Example(
                {
                    "importances": [1.0, 5.0, 1.0],
                    "anchors": [2.0, 2.0, 2.0],
                    "path": [3.0, -3.0, -3.0],
                    "params": [3.0, 3.0, 3.0],
                    "xi": 0.5,
                },
                {"importances": [3.0, 3.0, 0.0], "anchors": [3.0] * 3, "path": [0.0] * 3},
            ),
        ),
        variant="clamp_total",
    ),
    Op(
        "consolidate_riemannian_walk_",
        (
            importances("write"),
            anchors("write"),
            weights("score", "update"),
            weights("task_score", "update"),
            weights("fisher"),
            params(),
            fraction("mix", 0.25),
        ),
        (
            Example(
                {
                    "importances": [9.0, 9.0],
                    "anchors": [9.0, 9.0],
                    "score": [2.0, 0.0],
                    "task_score": [6.0, 2.0],
                    "fisher": [4.0, 1.0],
                    "params": [7.0, 8.0],
                    "mix": 0.5,
                },
                {
                    "importances": [2.0, 0.5],
                    "anchors": [7.0, 8.0],
                    "score": [4.0, 1.0],
                    "task_score": [0.0, 0.0],
                },
            ),
            # Nothing learned: no importance, rather than 0 / 0.
            Example(
                {
                    "importances": 9.0,
                    "anchors": 9.0,
                    "score": 0.0,
                    "task_score": 0.0,
                    "fisher": 0.0,
                    "params": 7.0,
                    "mix": 0.5,
                },
                {"importances": 0.0, "anchors": 7.0, "score": 0.0, "task_score": 0.0},
            ),
        ),
        couples_tensors=True,
    ),
    *STEPS,
)
