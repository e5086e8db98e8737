"""Random transforms of the examples, drawn anew each time the model trains on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn

Transform = Callable[[Tensor], Tensor]


def augmentation(
    transform: str | Transform | None, batch_transform: Transform | None
) -> Transform | None:
    """What makes of a batch [N, ...] another one; None where nothing is to be done.

    Args:
        transform: of one example, and then of the next: those of torchvision.transforms.v2 draw
            once for all that they are given. Or the name "crop-flip".
        batch_transform: of the batch after that; it draws for each example, as those of
            kornia.augmentation do.
    """
    each = crop_flip if isinstance(transform, str) else transform
    if each is None and batch_transform is None:
        return None

    def transformed_batch(batch: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(batch.device.type, enabled=False):
            if each is not None:
                batch = torch.stack([each(example) for example in batch])
            return batch if batch_transform is None else batch_transform(batch)

    return transformed_batch


def crop_flip(image: Tensor) -> Tensor:
    """The field's augmentation of CIFAR: a crop of the image padded by 4, mirrored or not.

    For images [C, H, W] (He et al. 2015, arXiv:1512.03385, section 4.2).
    """
    if image.dim() != 3:
        raise ValueError(f'"crop-flip" takes images [C, H, W], got {list(image.shape)}')
    return _crop_flip(tuple(image.shape[1:]))(image)


@cache
def _crop_flip(size: tuple[int, ...]) -> Transform:
    from torchvision.transforms import v2

    made: Transform = v2.Compose([v2.RandomCrop(size, padding=4), v2.RandomHorizontalFlip()])
    return made


@contextmanager
def transformed(model: nn.Module, transform: Transform | None) -> Iterator[None]:
    """Inside, `model` works on `transform` of its first input while it is in train mode.

    Whatever a method trains on is transformed so, the examples that it keeps of earlier tasks too;
    what it keeps, measures or predicts at other times is not.
    """
    if transform is None:
        yield
        return

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (transform(inputs[0]), *inputs[1:]) if module.training else None

    handle = model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
