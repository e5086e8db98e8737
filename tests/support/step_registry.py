"""The registry's entries for the steps of optimizers: one per combination worth its own tests."""

from __future__ import annotations

from op_arguments import (
    Arg,
    Counts,
    Example,
    Fixed,
    Op,
    Scalar,
    TensorArg,
    Unused,
    anchors,
    any_number,
    at_least_zero,
    below_one,
    fraction,
    grads,
    importances,
    params,
    state,
    weights,
)

LEVELS = {"plain": 0, "pull": 1, "path": 2, "walk": 3}


def _protection(level: str) -> tuple[Arg, ...]:
    number = LEVELS[level]
    return (
        state("path", "update") if number >= 2 else Unused("path"),
        weights("fisher", "update") if number >= 3 else Unused("fisher"),
        anchors() if number >= 1 else Unused("anchors"),
        importances() if number >= 1 else Unused("importances"),
    )


def _rest(proximal: bool, clear_grad: bool) -> tuple[Arg, ...]:
    return (
        at_least_zero("strength", 0.75),
        fraction("decay", 0.9),
        Fixed("proximal", proximal),
        Fixed("clear_grad", clear_grad),
        Fixed("grad_scale"),
        Fixed("found_inf"),
        Fixed("clip"),
    )


def sgd(
    level: str,
    *examples: Example,
    momentum: float = 0.0,
    dampening: float | None = None,
    maximize: bool = False,
    proximal: bool = False,
    clear_grad: bool = False,
) -> Op:
    """With momentum, Nesterov's where no dampening is given."""
    # Zero is another entry: it takes no buffers.
    number = Scalar("momentum", momentum, (-1.0, -1e-9, float("nan")), (1e-30, 1e30))
    nesterov = bool(momentum) and dampening is None
    return Op(
        "sgd_step_",
        (
            params("update"),
            grads("update" if clear_grad else "read"),
            state("momentum_buffers", "update") if momentum else Unused("momentum_buffers"),
            Counts("steps") if momentum else Unused("steps"),
            *_protection(level),
            TensorArg("lr", (), 0.125),
            number if momentum else Fixed("momentum", 0.0),
            Fixed("dampening", 0.0) if nesterov else any_number("dampening", dampening or 0.0),
            at_least_zero("weight_decay", 0.25),
            Fixed("nesterov", nesterov),
            Fixed("maximize", maximize),
            *_rest(proximal, clear_grad),
        ),
        examples,
        variant=f"{level} momentum" if momentum else level,
        fused=True,
    )


def adam(
    level: str,
    *examples: Example,
    decoupled: bool = False,
    maximize: bool = False,
    proximal: bool = False,
    clear_grad: bool = False,
) -> Op:
    return Op(
        "adam_step_",
        (
            params("update"),
            grads("update" if clear_grad else "read"),
            state("exp_avgs", "update"),
            weights("exp_avg_sqs", "update"),
            Counts("steps"),
            *_protection(level),
            TensorArg("lr", (), 0.125),
            below_one("beta1", 0.75),
            below_one("beta2", 0.5),
            at_least_zero("eps", 0.125),
            at_least_zero("weight_decay", 0.25),
            Fixed("decoupled", decoupled),
            Fixed("maximize", maximize),
            *_rest(proximal, clear_grad),
        ),
        examples,
        variant=level,
        fused=True,
    )


# The penalty is 0.5 and its gradient 0.5; weight decay adds 1.5, so that the step is for 4.
_PULL = {"params": 3.0, "grads": 2.0, "anchors": 1.0, "importances": 0.5, "strength": 0.25}
_WALK = {**_PULL, "weight_decay": 0.5, "path": 1.0, "fisher": 8.0, "decay": 0.75}
# 2 * lr * strength * importance is 1: the proximal pull goes half of the way.
_BACK = {"params": 3.0, "anchors": 1.0, "importances": 0.5, "strength": 2.0, "lr": 0.5}
# Averages without memory.
_MEAN = {"exp_avgs": 7.0, "exp_avg_sqs": 9.0, "steps": 4.0, "beta1": 0.0, "beta2": 0.0, "eps": 2.0}

STEPS = (
    sgd(
        "plain",
        Example({"params": 3.0, "grads": 2.0, "lr": 0.5, "weight_decay": 1.0}, {"params": 0.5}),
    ),
    sgd(
        "walk",
        Example(
            {**_WALK, "momentum_buffers": 4.0, "steps": 2.0, "lr": 0.5, "momentum": 0.5},
            {
                "params": 0.5,  # the buffer is 0.5 * 4 + 0.75 * 4
                "grads": 0.0,
                "momentum_buffers": 5.0,
                "steps": 3.0,
                "path": 6.0,
                "fisher": 7.0,
                "returns": 0.5,
            },
        ),
        # The first gradient enters the buffer whole.
        Example(
            {**_WALK, "momentum_buffers": 0.0, "steps": 0.0, "lr": 0.5, "momentum": 0.5},
            {
                "params": 1.0,
                "grads": 0.0,
                "momentum_buffers": 4.0,
                "steps": 1.0,
                "path": 5.0,
                "fisher": 7.0,
                "returns": 0.5,
            },
        ),
        momentum=0.5,
        dampening=0.25,
        clear_grad=True,
    ),
    sgd(
        "pull",
        # Nesterov's step for -4 leads from 3 to 5.75, and the pull half of the way back to 1.
        Example(
            {
                **_BACK,
                "grads": 4.0,
                "momentum_buffers": 2.0,
                "steps": 1.0,
                "momentum": 0.5,
                "weight_decay": 0.0,
            },
            {"params": 3.375, "momentum_buffers": -3.0, "steps": 2.0, "returns": 4.0},
        ),
        momentum=0.5,
        maximize=True,
        proximal=True,
    ),
    adam(
        "plain",
        Example(
            {**_MEAN, "lr": 0.5, "weight_decay": 0.5, "params": 3.0, "grads": 2.0},
            {
                "params": 2.0,  # 0.75 * 3 - 0.5 * 2 / (2 + 2)
                "exp_avgs": 2.0,
                "exp_avg_sqs": 4.0,
                "steps": 5.0,
            },
        ),
        decoupled=True,
    ),
    adam(
        "walk",
        # A step of 0.5 * 4 / (4 + 4).
        Example(
            {**_WALK, **_MEAN, "lr": 0.5, "eps": 4.0},
            {
                "params": 2.75,
                "grads": 0.0,
                "exp_avgs": 4.0,
                "exp_avg_sqs": 16.0,
                "steps": 5.0,
                "path": 1.5,
                "fisher": 7.0,
                "returns": 0.5,
            },
        ),
        clear_grad=True,
    ),
    adam(
        "path",
        # From 3 to 0.75 * 3 + 0.5 * 2 / (2 + 2), and half of the way back to 1.
        Example(
            {**_BACK, **_MEAN, "grads": 2.0, "weight_decay": 0.5, "path": 1.0},
            {
                "params": 1.75,
                "exp_avgs": -2.0,
                "exp_avg_sqs": 4.0,
                "steps": 5.0,
                "path": -1.5,
                "returns": 4.0,
            },
        ),
        decoupled=True,
        maximize=True,
        proximal=True,
    ),
)
