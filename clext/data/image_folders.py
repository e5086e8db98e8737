"""Data sets of image files in folders, as attributes like those of torchvision's CIFAR10.

Imported where torchvision is there. Classes and files come in a fixed order, which torchvision's
Omniglot takes from the file system.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import make_dataset
from torchvision.datasets.utils import download_and_extract_archive

_TRAINING_DRAWERS = 15  # of 20
_SIDE = 28


class TinyImageNet:
    """Tiny ImageNet (Le and Yang 2015): 200 classes of 500 training and 50 validation images.

    The test images have no labels, so that the validation images serve for testing.

    Attributes:
        data: uint8 [N, 64, 64, 3].
        targets: classes, in the order of `wnids.txt`.

    Raises:
        OSError: a file is missing or damaged, or (RuntimeError) the archive is another one.
    """

    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
    md5 = "90528d7ca1a48142e341f4ef8d21d0de"

    def __init__(self, root: Path, *, train: bool, download: bool = False) -> None:
        folder = root / "tiny-imagenet-200"
        if download and not folder.exists():
            download_and_extract_archive(self.url, str(root), md5=self.md5)
        names = (folder / "wnids.txt").read_text().split()
        numbers = {name: number for number, name in enumerate(names)}
        if train:
            found = make_dataset(folder / "train", numbers, (".jpeg",))
        else:
            lines = (folder / "val" / "val_annotations.txt").read_text().splitlines()
            pairs = (line.split("\t")[:2] for line in lines)
            found = [(folder / "val" / "images" / file, numbers[name]) for file, name in pairs]
        self.data = np.stack([_pixels(Image.open(path).convert("RGB")) for path, _ in found])
        self.targets = [label for _, label in found]


class Omniglot:
    """Omniglot (Lake et al. 2015): the 964 characters of its background set, 20 drawings of each.

    As in few-shot learning a drawing of 105x105 becomes one of 28x28, bright on dark (Vinyals et
    al. 2016, arXiv:1606.04080). For classification there is no split in use; here those by the
    first 15 drawers are for training and those by the other 5 for testing.

    Attributes:
        data: uint8 [N, 28, 28].
        targets: classes: alphabets, and the characters in them, in alphabetical order.

    Raises:
        OSError: a file is missing or damaged, or (RuntimeError) the archive is another one.
    """

    url = f"{torchvision.datasets.Omniglot.download_url_prefix}/images_background.zip"

    def __init__(self, root: Path, *, train: bool, download: bool = False) -> None:
        folder = Path(torchvision.datasets.Omniglot(root, download=download).target_folder)
        characters = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*"))
        numbers = {character: number for number, character in enumerate(characters)}
        drawings = make_dataset(folder, numbers, (".png",))
        found = [pair for pair in drawings if (_drawer(pair[0]) <= _TRAINING_DRAWERS) == train]
        self.data = np.stack([_small_and_bright(Image.open(path)) for path, _ in found])
        self.targets = [label for _, label in found]


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def _drawer(path: str) -> int:
    """From 1 to 20: files are called <character>_<drawer>.png."""
    return int(Path(path).stem.rpartition("_")[2])


def _small_and_bright(image: Image.Image) -> NDArray[np.uint8]:
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return 255 - _pixels(small)


OWN: dict[str, Any] = {"TinyImageNet": TinyImageNet, "Omniglot": Omniglot}


def dataset_class(name: str) -> Any:  # noqa: ANN401
    """The class of that name, of these two or of torchvision."""
    return OWN.get(name) or getattr(torchvision.datasets, name)
