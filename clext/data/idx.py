"""Read the four IDX files of an MNIST-like data set, plain or gzipped, and refuse broken ones.

The format, by Y. LeCun: a big-endian magic number 0x0000TTDD with the element type TT (0x08,
unsigned byte) and the number of dimensions DD, one 32-bit size per dimension, then the elements. A
damaged file would otherwise train without complaint, so everything is checked.
"""

from __future__ import annotations

import gzip
import math
import zlib
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIDE = 28
CLASSES = 10

_UNSIGNED_BYTE = 0x08
_PIECE = 2**20
_GZIP_MAGIC = b"\x1f\x8b"
_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class DataError(RuntimeError):
    """A data set is missing, or its files are damaged or of another kind."""


class IdxFiles(NamedTuple):
    """Where the four files of one data set lie."""

    train_images: Path
    train_labels: Path
    test_images: Path
    test_labels: Path


def find_idx_files(folder: Path) -> tuple[IdxFiles | None, list[str]]:
    """The four files in `folder`, or None; and the names of those that are missing."""
    found = [_find(folder, stem) for stem in _STEMS]
    missing = [stem for stem, path in zip(_STEMS, found, strict=True) if path is None]
    present = [path for path in found if path is not None]
    return (None if missing else IdxFiles(*present)), missing


def _find(folder: Path, stem: str) -> Path | None:
    """The plain file before the gzipped one; some sources write a dot before idx."""
    names = (stem, stem.replace("-idx", ".idx"))
    paths = (folder / f"{name}{suffix}" for suffix in ("", ".gz") for name in names)
    return next((path for path in paths if path.is_file()), None)


def read_images(path: Path) -> NDArray[np.uint8]:
    """The images of an IDX file as [N, 28, 28] unsigned bytes; DataError if it is broken."""
    images = _read(path, "image", dimensions=3)
    if images.shape[1:] != (SIDE, SIDE):
        height, width = images.shape[1:]
        raise DataError(f"{path}: expected images of {SIDE} x {SIDE}, found {height} x {width}")
    return images


def read_labels(path: Path, expected: int) -> NDArray[np.uint8]:
    """The labels of an IDX file as [N] unsigned bytes below 10; N must be `expected`."""
    labels = _read(path, "label", dimensions=1)
    if len(labels) != expected:
        raise DataError(
            f"{path}: expected {expected:,} labels, one an image, found {len(labels):,}"
        )
    if labels.max() >= CLASSES:
        at = int(labels.argmax())
        raise DataError(
            f"{path}: expected labels 0 to {CLASSES - 1}, found {labels[at]} (label number {at:,})"
        )
    return labels


def opening_labels(path: Path) -> bytes:
    """The first ten labels, which tell apart data sets that share their file names."""
    return _read(path, "label", dimensions=1)[:10].tobytes()


def _read(path: Path, kind: str, dimensions: int) -> NDArray[np.uint8]:
    header = 4 + 4 * dimensions
    content = _content(path, header)
    magic = bytes((0, 0, _UNSIGNED_BYTE, dimensions))
    if content[:4] != magic:
        found = f"0x{content[:4].hex()}" if content else "an empty file"
        raise DataError(
            f"{path}: not an IDX {kind} file: expected 0x{magic.hex()} at its start, found {found}"
        )
    shape = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4))
    expected = header + math.prod(shape)
    content = _content(path, expected + 1)
    if len(content) != expected or not shape[0]:
        problem, found = "truncated", f"{len(content):,}"
        if len(content) > expected:
            problem, found = "too long", "more"
        raise DataError(
            f"{path}: {problem}: its header says {shape[0]:,} {kind}s, so {expected:,} bytes, "
            f"found {found}; delete it and get it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _content(path: Path, most: int) -> bytes:
    """The first `most` bytes, or all if there are fewer: what is packed may be of any size."""
    try:
        with path.open("rb") as packed:
            # By content, not by suffix: browsers unpack or rename downloads as they please.
            is_packed = packed.peek(2)[:2] == _GZIP_MAGIC
            file = gzip.GzipFile(fileobj=packed) if is_packed else packed
            # By pieces, so that a header that promises too much reserves nothing.
            pieces = iter(lambda: file.read(_PIECE), b"")
            return b"".join(islice(pieces, -(-most // _PIECE)))[:most]
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path}: expected a complete gzip file, found a damaged one ({error}); "
            "delete it and get it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
