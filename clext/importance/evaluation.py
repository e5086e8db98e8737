"""Running a model over a task's data to look at it: nothing of the model may change."""

from __future__ import annotations

import sys
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clext.module_mode import module_mode
from clext.seeding import isolated_rng

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from contextlib import AbstractContextManager

    # Of (x, y), or where labels play no part x, (x,) or (x, y): checked as they are read.
    Batches = Iterable[Any]


@contextmanager
def evaluation(model: nn.Module, params: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Eval mode and gradients on inside; afterwards the model is bit for bit what it was.

    Training flags (module by module), buffers and the global random state are put back, whatever
    happens inside: dropout and batch statistics must not enter an importance, nor must measuring
    it change the training that follows. Autocast is off: estimates run in the dtype of the model.
    """
    device = params[0].device
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    # Looking a row up in these brings it to its norm, in place.
    tables = [
        (module.weight, module.weight._version, module.weight.detach().clone())
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        with (
            _eager(),
            module_mode(model, training=False),
            isolated_rng(seed, device),
            torch.autocast(device.type, enabled=False),
            # Its recurrent layers have no backward pass in eval mode.
            torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
            torch.enable_grad(),
        ):
            yield
    finally:
        with torch.no_grad():
            for weight, version, saved in tables:
                if weight._version != version:
                    weight.copy_(saved)
            for module, name, buffer, version, saved in buffers:
                if buffer._version != version:
                    buffer.copy_(saved)
                setattr(module, name, buffer)


def read_batches(
    owner: str, batches: Batches | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (x, y) batches of a task on `device`; ValueError if they are not such, or none come."""
    samples = 0
    for index, batch in _numbered(owner, batches, "(x, y) batches"):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of {len(batch)} entries" if isinstance(batch, tuple | list) else ""
            raise ValueError(
                f"{owner}: batch {index} is a {type(batch).__name__}{size}, expected a pair (x, y)"
            )
        x, y = (_tensor(owner, name, index, entry) for name, entry in zip("xy", batch, strict=True))
        if len(x) != len(y):
            raise ValueError(
                f"{owner}: batch {index} has {len(x)} inputs but {len(y)} labels, "
                "expected one label per input"
            )
        samples += len(x)
        if len(x) > 0:
            yield x.to(device), y.to(device)
    _check_count(owner, samples)


def read_inputs(owner: str, batches: Batches | None, device: torch.device) -> Iterator[Tensor]:
    """The inputs on `device` of batches x, (x,) or (x, y), of which y may be anything."""
    samples = 0
    for index, batch in _numbered(owner, batches, "batches x or (x, y)"):
        first = batch[0] if isinstance(batch, tuple | list) and batch else batch
        x = _tensor(owner, "x", index, first)
        samples += len(x)
        if len(x) > 0:
            yield x.to(device)
    _check_count(owner, samples)


def _numbered(owner: str, batches: object, expected: str) -> Iterator[tuple[int, Any]]:
    try:
        iterator: Iterator[Any] = iter(batches)  # type: ignore[call-overload]  # that is the check
    except TypeError:
        raise ValueError(
            f"{owner} needs the data of the task: expected an iterable of {expected}, "
            f"got {'nothing' if batches is None else type(batches).__name__}"
        ) from None
    yield from enumerate(iterator)


def _tensor(owner: str, name: str, index: int, entry: object) -> Tensor:
    if isinstance(entry, Tensor) and entry.dim() > 0:
        return entry
    what = "a 0-dim tensor" if isinstance(entry, Tensor) else type(entry).__name__
    remedy = ""
    if name == "x":
        remedy = "; for a model with other inputs, pass a module that takes one tensor apart for it"
    raise ValueError(
        f"{owner}: {name} of batch {index} is {what}, expected a tensor with one entry per sample"
        f"{remedy}"
    )


def _check_count(owner: str, samples: int) -> None:
    if samples == 0:
        raise ValueError(f"{owner}: the data of the task is empty, expected at least one sample")


def check_outputs(owner: str, outputs: object, samples: int) -> Tensor:
    """`outputs` if it is a finite [samples, outputs] tensor; ValueError otherwise."""
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[0] != samples:
        got = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"{owner}: the model returned {got}, expected logits of shape [{samples}, outputs] "
            "(one row per sample)"
        )
    if not bool(outputs.isfinite().all()):
        raise ValueError(
            f"{owner}: the model's outputs are not finite (NaN or infinity), so they have no "
            "gradient to measure"
        )
    return outputs


def check_labels(owner: str, labels: Tensor, classes: int) -> Tensor:
    """`labels` as int64 if they are integers in [0, classes), one per sample; else ValueError."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{owner}: labels have dtype {labels.dtype}, expected integer classes")
    if labels.dim() != 1:
        raise ValueError(
            f"{owner}: labels have shape {list(labels.shape)}, expected [{labels.shape[0]}] "
            "(one class per sample)"
        )
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"{owner}: labels reach from {lowest} to {highest}, expected classes in "
            f"[0, {classes - 1}] (the model has {classes} outputs)"
        )
    return labels.long()


def gradients(outputs: Tensor, params: Sequence[Tensor], cotangent: Tensor) -> dict[int, Tensor]:
    """D sum(outputs * cotangent) / d params[i] by i, for those that the outputs depend on."""
    trainable = [i for i, entry in enumerate(params) if entry.requires_grad]
    if not trainable or not outputs.requires_grad:
        return {}
    found: Sequence[Tensor | None] = torch.autograd.grad(
        outputs,
        [params[i] for i in trainable],
        cotangent.to(outputs.dtype),
        retain_graph=True,  # another cotangent may follow
        allow_unused=True,
    )
    return {
        i: entry.to_dense()  # an Embedding may give a sparse one
        for i, entry in zip(trainable, found, strict=True)
        if entry is not None
    }


def averaged(owner: str, sums: list[Tensor], samples: int) -> list[Tensor]:
    """`sums` divided by the number of samples, in place; ValueError if one is not finite."""
    for entry in sums:
        entry.div_(samples)
    if not all(bool(entry.isfinite().all()) for entry in sums):
        raise ValueError(
            f"{owner}: an importance is not finite (NaN or infinity): the gradients of the model "
            "overflow on this data"
        )
    return sums


def _eager() -> AbstractContextManager[Any]:
    """Compiled models run eagerly: compiled code leaves out hooks that came after it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing is compiled, and importing it takes seconds
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
