"""Small files in the formats of the data sets that need torchvision, with their checksums told."""

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

CLASSES = {
    "emnist": 47,
    "cifar10": 10,
    "cifar100": 100,
    "svhn": 10,
    "tiny_imagenet": 200,
    "omniglot": 964,
}


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
    writers = {
        "emnist": _emnist,
        "cifar10": _cifar,
        "cifar100": _cifar,
        "svhn": _svhn,
        "tiny_imagenet": _tiny_imagenet,
        "omniglot": _omniglot,
    }
    return writers[name](name, folder, monkeypatch, {"train": train, "test": test})


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


def _tiny_imagenet(name, root, monkeypatch, counts) -> dict:
    folder, names = root / "tiny-imagenet-200", ["n02", "n01", "n03"]  # in no order, as there
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(names) + "\n")
    written, annotations = {}, []
    for part, count in counts.items():
        pixels, labels = images_and_labels(3, count, (64, 64, 3))
        shown = []
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            box = "\t0\t0\t63\t63\n"
            if part == "test":
                file = folder / "val" / "images" / f"val_{number}.JPEG"
                annotations.append(f"{file.name}\t{names[label]}{box}")
            else:
                images = folder / "train" / names[label] / "images"
                images.mkdir(parents=True, exist_ok=True)
                (images.parent / f"{names[label]}_boxes.txt").write_text(f"none{box}")
                file = images / f"{names[label]}_{number:03}.JPEG"
            Image.fromarray(image[..., 0] if number == 4 else image).save(file)  # some are grey
            shown.append(np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1))
        # By the name of the folder, and within it by that of the file.
        order = np.argsort(np.array(names)[labels], kind="stable") if part == "train" else ...
        written[part] = np.stack(shown)[order], labels[order]
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
    return written


def _omniglot(name, root, monkeypatch, counts) -> dict:
    source = torchvision.datasets.Omniglot
    folder = root / source.folder / "images_background"
    written = {"train": ([], []), "test": ([], [])}
    characters = [f"{a}/character{k:02}" for a in ("Greek", "Futurama") for k in (2, 1)]
    for number, character in enumerate(characters):
        (folder / character).mkdir(parents=True)
        for drawer in range(20, 0, -1):
            random = np.random.default_rng((number, drawer))
            strokes = np.kron(random.integers(0, 2, (3, 3)), np.ones((35, 35))).astype(bool)
            image = Image.fromarray(~strokes)  # dark on white, one bit a pixel
            image.save(folder / character / f"{number:04}_{drawer:02}.png")
    for label, character in enumerate(sorted(characters)):
        for file in sorted((folder / character).iterdir()):
            pixels, labels = written["train" if int(file.stem[-2:]) <= 15 else "test"]
            small = Image.open(file).convert("L").resize((28, 28), Image.Resampling.LANCZOS)
            pixels.append(255 - np.asarray(small))
            labels.append(label)
    (root / source.folder / "images_background.zip").write_bytes(b"the archive")
    checksum = _md5(root / source.folder / "images_background.zip")
    monkeypatch.setattr(source, "zips_md5", {"images_background": checksum})
    return {
        part: (np.stack(pixels), np.array(labels)) for part, (pixels, labels) in written.items()
    }


def as_inputs(pixels: np.ndarray) -> torch.Tensor:
    """What a model gets: numbers in [0, 1]; grey images in a row."""
    images = torch.from_numpy(pixels).float() / 255
    return images.flatten(1) if images.dim() == 3 else images
