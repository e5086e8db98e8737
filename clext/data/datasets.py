"""The data sets that have a name: MNIST and its kind, CIFAR and others, scikit-learn's digits.

`load_dataset` looks on this machine first, may download through torchvision (the optional extra
`vision`), and always says in one line which data it took and why.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clext.core.checks import as_path, unknown_name
from clext.core.console import say
from clext.core.names import DATASETS
from clext.core.seeding import generator
from clext.data.download import download, torchvision_problem
from clext.data.idx import (
    CLASSES,
    DataError,
    IdxFiles,
    find_idx_files,
    opening_labels,
    read_images,
    read_labels,
)
from clext.data.vision import (
    ENVIRONMENT_VARIABLE,
    VISION_DATASETS,
    Root,
    vision_images,
    vision_whereabouts,
)

# The defaults of `clext.train` are made for MNIST, which has forty times as many images.
DIGITS_LR = 1e-3
_ADVICE = {"digits": f". Digits are few: lr {DIGITS_LR:g} and 20 epochs suit them"}


class Split(NamedTuple):
    """Examples and their labels: `inputs` [N, ...], `labels` [N] int64."""

    inputs: Tensor
    labels: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Split:
        """The same examples on `device`, the inputs as `dtype`."""
        return Split(self.inputs.to(device, dtype), self.labels.to(device))


def as_numbers(inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Inputs as a model takes them: bytes, which are pixels, become numbers in [0, 1].

    They and floating-point inputs as `dtype`, if there is one; other integers stay.
    """
    if inputs.dtype == torch.uint8:
        return inputs.to(dtype or torch.float32).div_(255)
    return inputs.to(dtype) if dtype is not None and inputs.is_floating_point() else inputs


class Batches:
    """A split in its own order, in batches that are views of it; can be iterated many times."""

    def __init__(self, split: Split, batch_size: int) -> None:
        self._split, self._batch_size = split, batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = self._split
        return zip(inputs.split(self._batch_size), labels.split(self._batch_size), strict=True)

    def __len__(self) -> int:
        return -(-len(self._split.labels) // self._batch_size)


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, labels int64.

    Its inputs are pixels: bytes, of which a task makes numbers in [0, 1] (see `as_numbers`), or
    such numbers. Grey images are flattened, [N, features]; those in colour are [N, 3, H, W].
    `source` is the kind of place it came from and never a path: results record it.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    source: str

    @property
    def features(self) -> int:
        """Numbers in one example."""
        return math.prod(self.train.inputs.shape[1:])

    def describe(self) -> dict[str, Any]:
        """What a result records about its data."""
        return {
            "name": self.name,
            "source": self.source,
            "train": len(self.train.labels),
            "test": len(self.test.labels),
            "features": self.features,
            "classes": self.num_classes,
        }


@dataclass(frozen=True)
class _Files:
    """What distinguishes the data sets that come as IDX files."""

    title: str
    folder: str
    # MNIST's successors use its file names, so only the content tells them apart. These are the
    # first labels of the original training files, if they are known.
    opening: bytes = b""
    advice: str = ""


_IDX_DATASETS = {
    "mnist": _Files("MNIST", "MNIST", bytes((5, 0, 4, 1, 9, 2, 1, 3, 1, 4))),
    "fashion_mnist": _Files(
        "Fashion-MNIST",
        "FashionMNIST",
        bytes((9, 0, 0, 3, 0, 2, 7, 2, 5, 5)),
        "; on Debian, the package dataset-fashion-mnist has the files",
    ),
    "kmnist": _Files("KMNIST", "KMNIST"),
}


def load_dataset(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    show: bool = True,
    announce: bool = True,
    advise: bool = False,
) -> Dataset:
    """Load a data set by name and say on stderr, in one line, which one and why.

    Args:
        name: "auto" (MNIST, or scikit-learn's digits where MNIST cannot be had), or strictly
            "mnist", "fashion_mnist", "kmnist", "emnist" (its balanced split: 47 letters and
            digits), "cifar10", "cifar100", "svhn", "tiny_imagenet" (200 classes of 64x64, tested on
            its validation images), "omniglot" (964 characters as 28x28, of each 15 drawings to
            train and 5 to test on) or "digits".
        data_dir: folder with the IDX files, plain or gzipped, in itself, in `raw` or in
            `MNIST/raw` (`FashionMNIST/raw`, `KMNIST/raw`); or the folder that torchvision's class
            of the others would be given. By default $CLEXT_DATA, then the cache folder. A download
            goes to `data_dir`, else to the cache folder.
        show: let a download show its progress.
        announce: False where that line was said before.
        advise: let the line say which settings suit a data set that the defaults do not.

    Raises:
        ValueError: unknown name.
        DataError: the data cannot be had, or its files are damaged or of another kind.
    """
    if name not in DATASETS:
        raise unknown_name("dataset", name, DATASETS)
    if name == "digits":
        dataset, reason = _load_digits(), "comes with scikit-learn"
    elif name in VISION_DATASETS:
        dataset, reason = _load_vision(name, _roots(data_dir), show)
    else:
        dataset, reason = _load_idx_or_fall_back(name, _roots(data_dir), show)
    if announce:
        _announce(dataset, reason + (_ADVICE.get(dataset.name, "") if advise else ""))
    return dataset


def _announce(dataset: Dataset, reason: str) -> None:
    shape = " x ".join(map(str, dataset.train.inputs.shape[1:]))
    say(
        f"clext: data set {dataset.name} ({len(dataset.train.labels):,} training, "
        f"{len(dataset.test.labels):,} test images of {shape} pixels): {reason}"
    )


def whereabouts(data_dir: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Where each data set would come from, without reading or downloading it."""
    places, roots = {}, _roots(data_dir)
    for name in _IDX_DATASETS:
        located, reasons = _locate(name, roots)
        if located is not None:
            files, source = located
            places[name] = f"{files.train_images.parent} ({source})"
        else:
            problem = torchvision_problem() or f"would be downloaded to {roots[-1][0]}"
            places[name] = f"not found: {'; '.join([*reasons, problem])}"
    for name, kind in VISION_DATASETS.items():
        places[name] = vision_whereabouts(kind, roots)
    places["digits"] = "comes with scikit-learn"
    return places


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/clext, by default ~/.cache/clext; without a home in the temporary folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "clext"
    except RuntimeError:  # no home folder, as some containers have none
        return Path(tempfile.gettempdir()) / "clext"


def _roots(data_dir: str | os.PathLike[str] | None) -> list[Root]:
    if data_dir is not None:
        return [(as_path(data_dir, "data_dir"), "data_dir")]
    roots = [(cache_folder(), "the cache folder")]
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE)
    if from_environment:
        roots.insert(
            0, (as_path(from_environment, ENVIRONMENT_VARIABLE), f"${ENVIRONMENT_VARIABLE}")
        )
    return roots


def _load_idx_or_fall_back(name: str, roots: list[Root], show: bool) -> tuple[Dataset, str]:
    wanted = "mnist" if name == "auto" else name
    files = _IDX_DATASETS[wanted]
    located, reasons = _locate(wanted, roots)
    if located is None:
        root = roots[-1][0]
        problem = download(files.folder, root, show=show)
        if problem is None:
            located, _ = _locate(wanted, [(root, "a download")])
        else:
            reasons.append(problem)
    if located is not None:
        return _load_idx(wanted, *located), f"from {located[1]} ({located[0].train_images.parent})"
    why = "; ".join(reasons)
    if name == "auto":
        return _load_digits(), (
            f"comes with scikit-learn and stands in for MNIST, which was not found: {why}. "
            f"To use MNIST, set {ENVIRONMENT_VARIABLE} or pass data_dir (--data-dir)"
        )
    raise DataError(
        f"{files.title} cannot be had: {why}. Pass data_dir or set {ENVIRONMENT_VARIABLE} to a "
        f"folder with its four IDX files (plain or gzipped), or install torchvision (pip install "
        f"'clext[vision]') and run once with a network{files.advice}"
    )


def _load_vision(name: str, roots: list[Root], show: bool) -> tuple[Dataset, str]:
    files = VISION_DATASETS[name]
    (root, source), train, test = vision_images(files, roots, show=show)
    reason = f"from {source} ({root})"
    return Dataset(name, Split(*train), Split(*test), files.classes, source), reason


def _locate(name: str, roots: list[Root]) -> tuple[tuple[IdxFiles, str] | None, list[str]]:
    """The files and the kind of place they are in, if any; and what is wrong elsewhere."""
    files, reasons = _IDX_DATASETS[name], []
    for root, source in roots:
        if not root.is_dir():
            what = "is not a folder" if root.exists() else "does not exist"
            reasons.append(f"{source} ({root}) {what}")
            continue
        problem = f"no {files.title} files in {source} ({root})"
        for folder in (root / files.folder / "raw", root / files.folder, root / "raw", root):
            located, missing = find_idx_files(folder)
            if located is None:
                if len(missing) < len(IdxFiles._fields):
                    problem = f"{folder} lacks {', '.join(missing)}"
                continue
            other = _other_dataset(name, located)
            if other is None:
                return (located, source), reasons
            problem = f"the files in {folder} are {other}"
        reasons.append(problem)
    return None, reasons


def _other_dataset(name: str, located: IdxFiles) -> str | None:
    """The title of the known data set these files are, if it is not the one called `name`."""
    try:
        opening = opening_labels(located.train_labels)
    except DataError:
        return None  # reading the whole file says exactly what is wrong with it
    for other, files in _IDX_DATASETS.items():
        if other != name and opening == files.opening:
            return files.title
    return None


def _load_idx(name: str, located: IdxFiles, source: str) -> Dataset:
    train = _read_split(located.train_images, located.train_labels)
    test = _read_split(located.test_images, located.test_labels)
    return Dataset(name, train, test, CLASSES, source)


def _read_split(images_path: Path, labels_path: Path) -> Split:
    images = read_images(images_path)
    labels = read_labels(labels_path, expected=len(images))
    inputs = torch.from_numpy(images.reshape(len(images), -1).copy())  # the file's are read-only
    return Split(inputs, torch.from_numpy(labels.astype("int64")))


def _load_digits() -> Dataset:
    """The 1,797 digits of 8 x 8 pixels (values 0 to 16) that scikit-learn ships."""
    try:
        from sklearn.datasets import load_digits
    except Exception as error:
        raise DataError(
            f"the digits cannot be had: scikit-learn cannot be imported ({error}); "
            "pip install scikit-learn"
        ) from error
    pixels, digits = load_digits(return_X_y=True)
    inputs = torch.from_numpy(pixels.astype("float32")).div_(16)
    train, test = _stratified_split(Split(inputs, torch.from_numpy(digits.astype("int64"))))
    return Dataset("digits", train, test, CLASSES, "scikit-learn")


def _stratified_split(split: Split) -> tuple[Split, Split]:
    """A fifth of every class for testing, the same in every run whatever its seed."""
    fixed = generator(0)
    train, test = [], []
    for label in split.labels.unique():
        rows = (split.labels == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=fixed)]
        test.append(rows[: len(rows) // 5])
        train.append(rows[len(rows) // 5 :])
    parts = (torch.cat(rows).sort().values for rows in (train, test))
    train_split, test_split = (Split(split.inputs[rows], split.labels[rows]) for rows in parts)
    return train_split, test_split
