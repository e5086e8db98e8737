"""Running a model over a task's data to look at it: nothing of the model may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clext.core.batches import Batches as Batches  # for those who still look for it here
from clext.core.modes import module_mode, run_eagerly
from clext.core.seeding import isolated_rng

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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
