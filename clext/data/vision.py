"""The data sets that need torchvision: CIFAR, SVHN, EMNIST, Tiny ImageNet, Omniglot.

Its classes know the files' checksums; of EMNIST and Tiny ImageNet only the download has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clext.data.download import download, torchvision_problem
from clext.data.idx import DataError

ENVIRONMENT_VARIABLE = "CLEXT_DATA"

# A folder to look in, and the kind of place it is. A download goes to the last one.
Root = tuple[Path, str]


class Images(NamedTuple):
    """Images [N, C, H, W], or grey ones [N, H * W], as bytes; and their labels [N] int64."""

    inputs: Tensor
    labels: Tensor


@dataclass(frozen=True)
class VisionFiles:
    """How a data set's class is called (see `dataset_class`), and what that leaves to be done."""

    title: str
    class_name: str
    place: str  # what it has in its folder
    classes: int
    parts: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
    labels: str = "targets"
    order: tuple[int, ...] = (0, 3, 1, 2)  # the dimensions of `data` that are N, (C,) H, W


VISION_DATASETS = {
    # Of EMNIST's six splits "balanced": letters and digits, as many of each class. Its "digits" are
    # MNIST once more. Its files have rows and columns exchanged.
    "emnist": VisionFiles(
        "EMNIST",
        "EMNIST",
        "EMNIST/raw/emnist-balanced-train-images-idx3-ubyte",
        47,
        ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
        order=(0, 2, 1),
    ),
    "cifar10": VisionFiles("CIFAR-10", "CIFAR10", "cifar-10-batches-py", 10),
    "cifar100": VisionFiles("CIFAR-100", "CIFAR100", "cifar-100-python", 100),
    "svhn": VisionFiles(
        "SVHN",
        "SVHN",
        "train_32x32.mat",
        10,
        ({"split": "train"}, {"split": "test"}),
        labels="labels",
        order=(0, 1, 2, 3),
    ),
    "tiny_imagenet": VisionFiles("Tiny ImageNet", "TinyImageNet", "tiny-imagenet-200", 200),
    "omniglot": VisionFiles(
        "Omniglot", "Omniglot", "omniglot-py/images_background", 964, order=(0, 1, 2)
    ),
}


def vision_images(
    files: VisionFiles, roots: list[Root], *, show: bool
) -> tuple[Root, Images, Images]:
    """Training and test images, and where they were found or downloaded to.

    Raises:
        DataError: they can neither be found nor downloaded, or the files are damaged.
    """
    found, problem = _found(files, roots), torchvision_problem()
    place = found or (roots[-1][0], "a download")
    if found is None and problem is None:
        problem = download(files.class_name, place[0], show=show, parts=files.parts)
    if problem is not None:
        missing = [f"none in {source} ({root})" for root, source in roots if found is None]
        raise DataError(
            f"{files.title} cannot be had: {'; '.join([*missing, problem])}. Pass data_dir or "
            f"set {ENVIRONMENT_VARIABLE} to the folder that has its {files.place}, as "
            f"torchvision or the original archive leaves it, or install torchvision (pip "
            "install 'clext[vision]') and run once with a network"
        )
    return place, *_read(files, place[0])


def vision_whereabouts(files: VisionFiles, roots: list[Root]) -> str:
    """Where the images would come from, without reading or downloading them."""
    found = _found(files, roots)
    problem = torchvision_problem()
    if found is None:
        return f"not found: {problem or f'would be downloaded to {roots[-1][0]}'}"
    return f"{found[0] / files.place} ({problem or found[1]})"


def _found(files: VisionFiles, roots: list[Root]) -> Root | None:
    return next((root for root in roots if (root[0] / files.place).exists()), None)


def _read(files: VisionFiles, root: Path) -> tuple[Images, Images]:
    from clext.data.image_folders import dataset_class

    source = dataset_class(files.class_name)
    try:
        train, test = (_images(files, source(root, **part)) for part in files.parts)
    except Exception as error:  # torchvision checks little before it reads
        reason = next(iter(str(error).splitlines()), type(error).__name__).partition(". You can")[0]
        raise DataError(
            f"{root / files.place}: expected the files of {files.title}, found missing or damaged "
            f"ones ({reason}); delete them and get them again"
        ) from error
    return train, test


def _images(files: VisionFiles, found: Any) -> Images:  # noqa: ANN401
    """What an object of torchvision's class holds."""
    images = torch.as_tensor(found.data).permute(files.order).contiguous()
    labels = torch.as_tensor(getattr(found, files.labels), dtype=torch.int64)
    if not 0 < len(labels) == len(images):
        raise ValueError(f"{len(images):,} images and {len(labels):,} labels")
    if labels.min() < 0 or labels.max() >= files.classes:
        raise ValueError(f"labels {labels.min()} to {labels.max()} of {files.classes} classes")
    return Images(images.flatten(1) if images.dim() == 3 else images, labels)
