"""Teachers: a model as it was at the end of a task, and what another one learns from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clext.core.inputs import split
from clext.core.modes import call_with, module_mode
from clext.core.processes import apart, inner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from clext.core.inputs import Inputs
    from clext.methods.parts.heads import Heads

# How a distillation loss is scaled, the default first.
SCALES = ("squared", "mean", "none")
# Large enough that a batch keeps every core busy, small enough for any model's activations.
LARGE_BATCH = 1000


class Teacher:
    """Copies of a model's parameters and buffers, and the model run with them.

    The live model may have grown since: parameters that came later are the live ones, and a head
    that was replaced by a wider one of the same name has its old width.

    Args:
        model: whose values are copied, on the device where they are.
        logits: from inputs to all outputs [N, outputs], by calling `model`; None: `model`.
    """

    def __init__(self, model: nn.Module, logits: Callable[[Inputs], Tensor] | None = None) -> None:
        self._wrapped, self._model = model, inner(model)
        self._logits = model if logits is None else logits
        values = _values(self._model)
        self._values = {name: value.detach().clone() for name, value in values.items()}

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> Tensor:
        """All outputs of the model for `inputs` at that time, in eval mode, without gradients."""
        with module_mode(self._model, training=False), apart(self._wrapped):
            return call_with(self._model, self._values, self._logits, inputs)

    def record(self, inputs: Inputs) -> Tensor:
        """The same for many inputs, in batches of 1000."""
        return torch.cat([self(batch) for batch in split(inputs, LARGE_BATCH)])

    def to(self, device: torch.device) -> None:
        """Move the copies."""
        self._values = {name: value.to(device) for name, value in self._values.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies of the values by name."""
        return {"values": {name: value.clone() for name, value in self._values.items()}}

    @classmethod
    def load(
        cls,
        model: nn.Module,
        given: Mapping[str, Any] | None,
        logits: Callable[[Inputs], Tensor] | None = None,
    ) -> Teacher | None:
        """The teacher of `model` with such values, if any; ValueError if it never had such."""
        if given is None:
            return None
        teacher, live = cls(model, logits), _values(inner(model))
        teacher._values = {}
        for name, value in given["values"].items():
            fits = value.dim() == live[name].dim()
            if not fits or any(map(int.__gt__, value.shape, live[name].shape)):
                raise ValueError(
                    f"teacher: '{name}' is {list(value.shape)}, expected at most the "
                    f"{list(live[name].shape)} of the model"
                )
            teacher._values[name] = value.to(live[name].device, live[name].dtype, copy=True)
        return teacher


def check_teacher(owner: str, model: nn.Module, what: str = "model") -> None:
    """ValueError if a model, `what` in the message, is none: training has broken it."""
    known = dict(model.named_parameters())
    for name, value in _values(model).items():
        # Masks are buffers with -inf.
        broken = ~value.isfinite() if name in known else value.isnan()
        if bool(broken.any()):
            raise ValueError(
                f"{owner}: '{name}' of the {what} holds NaN or infinity, so the {what} is of no "
                "use to later tasks: go back to state dicts of the model and the method saved "
                "before it"
            )


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers; what is shared goes by its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float, scale: str) -> Tensor:
    """Cross entropy between the softened probabilities of a teacher and those of the model, 0-dim.

    T^2 * mean over examples of -sum_c p_c log q_c with p = softmax(teacher / T) and
    q = softmax(logits / T) (Hinton et al. 2015, arXiv:1503.02531).

    Args:
        logits: of the model, [N, classes].
        teacher: its logits, [N, classes that it knew], the first of those above; to the rest it
            gives the probability zero.
        temperature: T > 0.
        scale: "squared" as above, so that gradients do not shrink with T; "mean": T^2 divided by
            the number of classes; "none": without T^2.
    """
    # A sum of logarithms in bfloat16 would have two digits left.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.softmax(teacher.to(logits.dtype) / temperature, dim=1)
    log_probabilities = torch.log_softmax(logits / temperature, dim=1)
    loss = -(targets * log_probabilities[:, : teacher.shape[1]]).sum(dim=1).mean()
    if scale == "none":
        return loss
    return loss * (temperature**2 / (logits.shape[1] if scale == "mean" else 1))


def old_heads(heads: Heads, ended: int, known: int) -> list[tuple[slice, slice]]:
    """The outputs that examples of earlier tasks are told apart by.

    Args:
        heads: of the model.
        ended: tasks ended so far.
        known: how many outputs the model had then.

    Returns:
        For each head of the earlier tasks (one for all of them, but where each task has its own)
        the model's outputs that compete in it now, and those of them that did at the end of the
        last task.
    """
    active = heads.active
    if active is None:
        return [(slice(None), slice(0, known))]
    tops: dict[range, int] = {}
    for block in heads.blocks[:ended]:
        inside = active.start <= block.start and block.stop <= active.stop
        head = active if inside else block
        tops[head] = max(tops.get(head, 0), block.stop)
    return [
        (slice(head.start, head.stop), slice(head.start, min(top, known)))
        for head, top in tops.items()
    ]
