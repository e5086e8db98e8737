"""Small files in the formats of the data sets that torchvision reads, with their checksums told."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from scipy.io import savemat

CLASSES = {"emnist": 47, "cifar10": 10, "cifar100": 100, "svhn": 10}


def images_and_labels(
    classes: int, count: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Every class in turn; bytes that differ from place to place."""
    pixels = np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)
    return pixels, np.arange(count) % classes


def write(name: str, folder: Path, monkeypatch, train: int = 100, test: int = 100) -> dict:
    """Write the data set and have torchvision take its files for the real ones.

    Returns what was written: for "train" and "test" images as the data set shows them, and labels.
    """
    return {"emnist": _emnist, "cifar10": _cifar, "cifar100": _cifar, "svhn": _svhn}[name](
        name, folder, monkeypatch, {"train": train, "test": test}
    )


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def _cifar(name, root, monkeypatch, counts) -> dict:
    source = getattr(torchvision.datasets, name.upper())
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    written, lists = {}, {}
    for part, files in (("train", source.train_list), ("test", source.test_list)):
        pixels, labels = images_and_labels(CLASSES[name], counts[part], (3, 32, 32))
        written[part] = pixels, labels
        lists[part] = []
        shares = zip(
            files,
            np.array_split(pixels.reshape(len(pixels), -1), len(files)),
            np.array_split(labels, len(files)),
            strict=True,
        )
        for (file, _), rows, own in shares:
            key = "labels" if name == "cifar10" else "fine_labels"
            (folder / file).write_bytes(pickle.dumps({"data": rows, key: own.tolist()}))
            lists[part].append([file, _md5(folder / file)])
    meta = folder / source.meta["filename"]
    meta.write_bytes(pickle.dumps({source.meta["key"]: [str(k) for k in range(CLASSES[name])]}))
    monkeypatch.setattr(source, "train_list", lists["train"])
    monkeypatch.setattr(source, "test_list", lists["test"])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": _md5(meta)})
    return written


def _svhn(name, root, monkeypatch, counts) -> dict:
    source = torchvision.datasets.SVHN
    root.mkdir(parents=True, exist_ok=True)
    written, known = {}, dict(source.split_list)
    for part, count in counts.items():
        pixels, labels = images_and_labels(10, count, (3, 32, 32))
        written[part] = pixels, labels
        file = root / source.split_list[part][1]
        content = {
            "X": pixels.transpose(2, 3, 1, 0),
            "y": np.where(labels == 0, 10, labels)[:, None],
        }
        savemat(file, content)
        known[part] = [source.split_list[part][0], file.name, _md5(file)]
    monkeypatch.setattr(source, "split_list", known)
    return written


def _emnist(name, root, monkeypatch, counts) -> dict:
    folder = root / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    written = {}
    for part, count in counts.items():
        pixels, labels = images_and_labels(47, count, (28, 28))
        written[part] = pixels, labels
        stem = f"emnist-balanced-{part}"
        stored = pixels.transpose(0, 2, 1).tobytes()
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(
            struct.pack(">4i", 0x803, count, 28, 28) + stored
        )
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + labels.astype(np.uint8).tobytes()
        )
    return written


def as_inputs(pixels: np.ndarray) -> torch.Tensor:
    """What a model gets: numbers in [0, 1]; grey images in a row."""
    images = torch.from_numpy(pixels).float() / 255
    return images.flatten(1) if images.dim() == 3 else images
