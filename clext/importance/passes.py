"""Running a model over a task's data to look at it: nothing of the model may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clext.core.modes import module_mode, run_eagerly
from clext.core.seeding import isolated_rng

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    # Of (x, y), or where labels play no part x, (x,) or (x, y): checked as they are read.
    Batches = Iterable[Any]

_ONE_BATCH = "where there is a single batch, pass [(x, y)]"


@contextmanager
def evaluation(model: nn.Module, params: Sequence[Tensor], seed: int) -> Iterator[None]:
    """Eval mode and gradients on inside; afterwards the model is bit for bit what it was.

    Training flags (module by module), buffers and the global random state are put back, whatever
    happens inside: dropout and batch statistics must not enter an importance, nor must measuring
    it change the training that follows. Autocast is off: estimates run in the dtype of the model.
    Inference mode is off too; ValueError for a model that was made in it, which has no gradients.
    """
    for what, entries in (
        ("parameters", (*params, *model.parameters())),
        ("buffers", model.buffers()),
    ):
        if any(entry.is_inference() for entry in entries):
            raise ValueError(
                f"importance of {type(model).__name__}: its {what} are inference tensors, which "
                "have no gradients: make or load the model outside of torch.inference_mode()"
            )
    device = params[0].device
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with (
        torch.inference_mode(False),
        _state_kept(model),
        run_eagerly(),
        module_mode(model, training=False),
        isolated_rng(seed, device),
        torch.autocast(device.type, enabled=False),
        # Its recurrent layers have no backward pass in eval mode.
        torch.backends.cudnn.flags(enabled=False) if recurrent else nullcontext(),
        torch.enable_grad(),
    ):
        yield


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward pass may change: buffers, and tensors that modules keep.

    A tensor kept inside of torch.func is dead after it: it cannot even be copied.
    """
    modules = list(model.modules())
    registered = [(m, dict(m._buffers), set(m._non_persistent_buffers_set)) for m in modules]
    kept = [(m, dict(m.__dict__)) for m in modules]
    # Looking a row up in these brings it to its norm, in place.
    tables = [
        module.weight
        for module in modules
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.buffers(), *tables)]
    try:
        yield
    finally:
        for module, attributes in kept:
            for name, now in list(module.__dict__.items()):
                if isinstance(now, Tensor) and attributes.get(name) is not now:
                    del module.__dict__[name]
            before = {k: v for k, v in attributes.items() if isinstance(v, Tensor)}
            module.__dict__.update(before)
        for module, buffers, non_persistent in registered:
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set = non_persistent
        with torch.no_grad():
            for tensor, saved in values:
                # By value: `data` does not count versions. No write where nothing changed, as
                # that would spoil graphs of the caller.
                if tensor.shape != saved.shape:
                    tensor.data = saved
                elif not torch.equal(tensor, saved):
                    tensor.copy_(saved)


def parameter_list(owner: str, model: nn.Module, params: object) -> list[Tensor]:
    """`params` as a list; ValueError if they are no parameters, or none of the model's."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    expected = f"{owner}: expected params to be a sequence of the model's parameters, got "
    if isinstance(params, Tensor | Mapping) or not isinstance(params, Iterable):
        remedy = "; pass list(params.values())" if isinstance(params, Mapping) else ""
        raise ValueError(f"{expected}{type(params).__name__}{remedy}")
    found = list(params)
    for entry in found:
        if not isinstance(entry, Tensor):
            raise ValueError(f"{expected}one with {type(entry).__name__} in it")
    if not found:
        raise ValueError(f"{expected}an empty one")
    own = {id(entry) for entry in model.parameters()}
    if not any(id(entry) in own for entry in found):
        raise ValueError(
            f"{expected}{len(found)} tensors of which none is a parameter of this "
            f"{type(model).__name__}; pass list(model.parameters()) of the same model"
        )
    return found


def single_outputs(model: nn.Module, sample: Tensor) -> Tensor:
    """The outputs for one sample, [1, outputs], of a model that takes a batch of several.

    ValueError where it cannot do without the others.
    """
    try:
        outputs: Tensor = model(sample.clone())
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"importance of {type(model).__name__}: it takes a batch but not one sample alone "
            f'("{error}"), so it mixes the samples of a batch, and no sample has a gradient of its '
            "own; take the option \"batch\" of EWC's fisher or MAS's estimator, or let batch norms "
            "track running statistics"
        ) from error
    return outputs


def read_batches(
    owner: str, batches: Batches | None, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """The (x, y) batches of a task on `device`; ValueError if they are not such, or none come."""
    samples = 0
    for index, batch in _numbered(owner, batches, "(x, y) batches"):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of {len(batch)} entries" if isinstance(batch, tuple | list) else ""
            remedy = f"; {_ONE_BATCH}" if isinstance(batch, Tensor) else ""
            raise ValueError(
                f"{owner}: batch {index} is a {type(batch).__name__}{size}, expected a pair (x, y)"
                f"{remedy}"
            )
        x, y = (_tensor(owner, name, index, entry) for name, entry in zip("xy", batch, strict=True))
        if len(x) != len(y):
            raise ValueError(
                f"{owner}: batch {index} has {len(x)} inputs but {len(y)} labels, "
                "expected one label per input"
            )
        samples += len(x)
        if len(x) > 0:
            yield _ordinary(x).to(device), _ordinary(y).to(device)
    _check_count(owner, samples)


def read_inputs(owner: str, batches: Batches | None, device: torch.device) -> Iterator[Tensor]:
    """The inputs on `device` of batches x, (x,) or (x, y), of which y may be anything."""
    if isinstance(batches, Tensor) or _is_pair(batches):
        got = "one tensor" if isinstance(batches, Tensor) else "one pair (x, y)"
        raise ValueError(
            f"{owner}: the data of the task is {got}, expected an iterable of batches; {_ONE_BATCH}"
        )
    samples = 0
    for index, batch in _numbered(owner, batches, "batches x or (x, y)"):
        first = batch[0] if isinstance(batch, tuple | list) and batch else batch
        x = _tensor(owner, "x", index, first)
        samples += len(x)
        if len(x) > 0:
            yield _ordinary(x).to(device)
    _check_count(owner, samples)


def _is_pair(batches: object) -> bool:
    """Whether they are the inputs and labels of one batch, not two batches of inputs."""
    if not isinstance(batches, tuple | list) or len(batches) != 2:
        return False
    x, y = batches
    return (
        isinstance(x, Tensor)
        and isinstance(y, Tensor)
        and y.dim() == 1
        and x.shape[:1] == y.shape
        and (x.dim() > 1 or x.dtype != y.dtype)
    )


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


def _ordinary(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy that a graph may save."""
    return tensor.clone() if tensor.is_inference() else tensor


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


def integer_labels(owner: str, labels: Tensor) -> Tensor:
    """`labels` as int64 if they are integers, one per sample; else ValueError."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{owner}: labels have dtype {labels.dtype}, expected integer classes")
    if labels.dim() != 1:
        raise ValueError(
            f"{owner}: labels have shape {list(labels.shape)}, expected [{labels.shape[0]}] "
            "(one class per sample)"
        )
    return labels.long()  # torch has no minimum for all types of integers


def check_labels(owner: str, labels: Tensor, classes: int) -> Tensor:
    """`labels` as int64 if they are integers in [0, classes), one per sample; else ValueError."""
    labels = integer_labels(owner, labels)
    lowest, highest = int(labels.min()), int(labels.max())
    if lowest < 0 or highest >= classes:
        raise ValueError(
            f"{owner}: labels reach from {lowest} to {highest}, expected classes in "
            f"[0, {classes - 1}] (the model has {classes} outputs)"
        )
    return labels


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
