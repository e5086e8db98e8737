"""A trial of transform and model on two examples, before a run begins."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clext.core.inputs import described, one_tensor, taken
from clext.core.modes import module_mode
from clext.data.datasets import as_numbers
from clext.data.loaders import LoaderTask
from clext.training.spec import input_dtype

if TYPE_CHECKING:
    from clext.core.inputs import Inputs
    from clext.data.scenario import Scenario
    from clext.data.task import Task
    from clext.methods import Method
    from clext.training.augmentation import Transform


def check_forward(
    method: Method, scenario: Scenario, device: torch.device, transform: Transform | None = None
) -> None:
    """Try them on two examples: an error in the first step would name no argument."""
    outputs, shape = scenario.num_outputs, ""
    inputs, remedy = _probe(method, scenario.tasks[0], device)
    if isinstance(inputs, Tensor):
        shape = f" [{', '.join(['N', *map(str, inputs.shape[1:])])}]"
    expected = f"inputs{shape} into logits [N, {outputs}]"
    if transform is not None:
        _check_transform(inputs, transform)
    try:
        with torch.no_grad(), module_mode(method.model, training=False):
            logits = method.heads.outputs(inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ValueError(
            f"train: model must turn {expected}, but failed on such inputs ({error}); {remedy}"
        ) from error
    if logits.dim() != 2 or logits.shape[1] < outputs:
        raise ValueError(f"train: model must turn {expected}, got {list(logits.shape)} for N = 2")


def _probe(method: Method, task: Task | LoaderTask, device: torch.device) -> tuple[Inputs, str]:
    """Two examples as the model is given them, and what to do if it does not take them."""
    read = method.heads.inputs_and_labels
    if isinstance(task, LoaderTask):
        with closing(task.to(device).test_batches(read)) as batches:
            inputs, _ = read(next(batches))
        return taken(inputs, slice(2)), "forward= of the method says how to call it"
    stored = as_numbers(task.stored_train.inputs[:1], input_dtype(method.model))
    probe = torch.zeros(2, *task.input_shape, device=device, dtype=stored.dtype)
    remedy = "begin it with nn.Unflatten if it takes images"
    if not stored.is_floating_point():
        remedy = (
            f"the inputs are {stored.dtype}: pass inputs.float() if they are numbers, begin the "
            "model with nn.EmbeddingBag if they are tokens"
        )
    inputs, _ = read((probe, torch.zeros(2, dtype=torch.int64, device=device)))
    return inputs, remedy


def _check_transform(probe: Inputs, transform: Transform) -> None:
    """ValueError if two examples are not alike any more."""
    expected = f"train: transform must keep shape and type of two examples {described(probe)}"
    remedy = "evaluation shows the model plain ones; for others change the data"
    try:
        found = transform(one_tensor("train: transform", probe))
    except Exception as error:  # whatever a user's function raises
        raise ValueError(f"{expected}, but failed ({error}); {remedy}") from error
    if described(found) != described(probe):
        raise ValueError(f"{expected}, got {described(found)}; {remedy}")
