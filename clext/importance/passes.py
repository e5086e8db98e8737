"""Passes of a model over a task's data, which leave the model as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clext.core.inputs import Inputs, mapped
from clext.core.modes import buffers_kept, module_mode, run_eagerly, without_checkpointing
from clext.core.processes import apart, sharded_modules
from clext.core.seeding import isolated_rng
from clext.core.sharding import is_sharded, part_of, sharded_as, whole

# From the inputs of a batch to outputs [samples, ...], by calling the model.
Forward = Callable[[Inputs], Tensor]


@contextmanager
def evaluation(model: nn.Module, params: Sequence[Tensor], seed: int) -> Iterator[list[Tensor]]:
    """Eval mode and gradients on inside; afterwards the model is bit for bit what it was.

    Gives the parameters to look at: where a mesh of processes holds `params`, each of them has
    whole copies inside, and the model runs on these without the others.

    Dropout and batch statistics must not enter an importance, nor must measuring it change the
    training that follows: training flags, buffers, attributes and the global random state are put
    back. Autocast is off: estimates run in the dtype of the model. Inference mode is off too;
    ValueError for a model that was made in it, which has no gradients.
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
    with (
        torch.inference_mode(False),
        apart(model),
        _attributes_kept(model),
        buffers_kept(model),
        run_eagerly(),
        without_checkpointing(),
        module_mode(model, training=False),
    ):
        _compute_plainly(model)
        copies = _hold_whole(model)
        params = [copies.get(id(entry), entry) for entry in params]
        device = params[0].device
        with (
            isolated_rng(seed, device),
            torch.autocast(device.type, enabled=False),
            torch.enable_grad(),
            _gradients_kept(model),
        ):
            yield params


def _hold_whole(model: nn.Module) -> dict[int, Tensor]:
    """Put whole parameters in the place of sharded ones, and take off the hooks of their mesh.

    Returns them by the sharded parameter's id. What is put back later are the modules' attributes.
    """
    for module in sharded_modules(model):
        module.reshard()
    copies: dict[int, Tensor] = {}
    for entry in model.parameters():
        if is_sharded(entry):
            copies[id(entry)] = nn.Parameter(whole(entry.detach()), entry.requires_grad)
    if not copies:
        return copies
    for module in model.modules():
        named = module._parameters.items()
        module._parameters = {name: copies.get(id(entry), entry) for name, entry in named}  # type: ignore[misc]
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            hooks = module.__dict__[kind].items()
            own = [(key, hook) for key, hook in hooks if not _is_of_a_mesh(hook)]
            module.__dict__[kind] = OrderedDict(own)
        for name, value in list(module.__dict__.items()):
            if _is_of_a_mesh(value):  # register_fsdp_forward_method
                del module.__dict__[name]
    return copies


def _is_of_a_mesh(hook: object) -> bool:
    """Whether FSDP2 or tensor parallel has put this function on a module."""
    where = getattr(hook, "__globals__", {}).get("__name__", "")
    return str(where).startswith("torch.distributed.")


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Puts the parameters' gradients back.

    ValueError if a backward pass of the model's own has left some, as checkpointing by other means
    than torch's does: what it goes through has no part in the gradients that are measured.
    """
    before = [(entry, entry.grad) for entry in model.parameters()]
    for entry, _ in before:
        entry.grad = None
    try:
        yield
        if any(entry.grad is not None for entry, _ in before):
            raise ValueError(
                f"importance of {type(model).__name__}: it runs a backward pass of its own, which "
                "hides gradients from what is measured; turn its activation checkpointing off"
            )
    finally:
        for entry, gradient in before:
            entry.grad = gradient


def _compute_plainly(model: nn.Module) -> None:
    """Give modules a `forward` that autograd and the rules can look into."""
    for module in model.modules():
        if "_original_forward" in module.__dict__:  # prepared by accelerate: inside of an autocast
            module.forward = module.__dict__["_original_forward"]
        if isinstance(module, nn.RNNBase):
            module.forward = partial(_step_by_step, module.forward)


def _step_by_step(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """A recurrent layer without the libraries that compute it as a whole: one hides the gates, the
    other has no backward pass in eval mode.
    """
    before = torch.backends.mkldnn.set_flags(False, _fp32_precision=None)[0]
    try:
        with torch.backends.cudnn.flags(enabled=False):
            return forward(*args, **kwargs)
    finally:
        torch.backends.mkldnn.set_flags(before, _fp32_precision=None)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Puts back the modules' attributes, and the tables of embeddings with a norm.

    A forward pass may keep a tensor on its module: of a pass in torch.func it is dead later, and
    cannot even be copied. And it brings the rows that it looks up to their norm, in place.
    """
    before = [(module, dict(module.__dict__)) for module in model.modules()]
    tables: list[Any] = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    ]
    values = [table.detach().clone() for table in tables]
    try:
        yield
    finally:
        for module, attributes in before:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        with torch.no_grad():
            for table, value in zip(tables, values, strict=True):
                table.copy_(value)


def parameter_list(owner: str, model: nn.Module, params: object) -> list[Tensor]:
    """`params` as a list; ValueError if none is a parameter of the model's, or all are frozen."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}")
    taken = isinstance(params, Iterable) and not isinstance(params, Tensor | Mapping)
    found: list[Any] = list(params) if taken else []  # type: ignore[call-overload]
    own = {id(entry) for entry in model.parameters()}
    if not any(id(entry) in own for entry in found) or not all(
        isinstance(entry, Tensor) for entry in found
    ):
        got = f"{type(params).__name__}{f' of {len(found)} entries' if taken else ''}"
        raise ValueError(
            f"{owner}: expected params to be parameters of this {type(model).__name__}, got {got}; "
            "pass list(model.parameters()) of the same model"
        )
    if not any(entry.requires_grad for entry in found):
        raise ValueError(
            f"{owner}: all these parameters of {type(model).__name__} are frozen, so they have no "
            "gradient; call model.requires_grad_(True) before (merge_and_unload leaves them frozen)"
        )
    return found


def single_outputs(owner: str, forward: Forward, sample: Inputs) -> Tensor:
    """The outputs for one sample, [1, ...], of a model that takes a batch of several.

    ValueError where it cannot do without the others.
    """
    try:
        return forward(mapped(Tensor.clone, sample))
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{owner}: the model takes a batch but not one sample alone "
            f'("{error}"), so it mixes the samples of a batch, and no sample has a gradient of its '
            "own; take the option \"batch\" of EWC's fisher or MAS's estimator, or let batch norms "
            "track running statistics"
        ) from error


def check_finite(owner: str, outputs: Tensor) -> Tensor:
    """The outputs; ValueError if they are not finite."""
    if not bool(outputs.isfinite().all()):
        raise ValueError(
            f"{owner}: the model's outputs are not finite (NaN or infinity), so they have no "
            "gradient to measure; the model has diverged: try a smaller lr, or a smaller strength"
        )
    return outputs


def flat(outputs: Tensor) -> Tensor:
    """Outputs [samples, ...] as [samples, outputs]."""
    return outputs.reshape(len(outputs), -1)


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


def averaged(
    owner: str, sums: list[Tensor], samples: int, params: Sequence[Tensor]
) -> list[Tensor]:
    """`sums` divided by the number of samples, in place; ValueError if one is not finite.

    Sharded as `params` are.
    """
    for entry in sums:
        entry.div_(samples)
    if not all(bool(entry.isfinite().all()) for entry in sums):
        raise ValueError(
            f"{owner}: an importance is not finite (NaN or infinity): the gradients of the model "
            "overflow on this data"
        )
    pairs = zip(params, sums, strict=True)
    return [sharded_as(like, part_of(like, entry).to(like.device)) for like, entry in pairs]
