"""Texts as token ids: data sets of Hugging Face, with a tokenizer that needs no download."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clext.data.datasets import Dataset, Split

Tokenizer = Callable[..., Mapping[str, Any]]
_PADDING = 0


def text_dataset(
    data: Mapping[str, Any],
    *,
    text: str = "text",
    label: str = "label",
    train: str = "train",
    test: str = "test",
    length: int = 128,
    vocabulary: int = 2**15,
    tokenizer: Tokenizer | None = None,
    name: str = "text",
) -> Dataset:
    """A data set of texts for `Scenario.split(...)`: inputs are token ids, int64 [N, length].

    ::

        news = text_dataset(datasets.load_dataset("fancyzhx/ag_news"), name="AG News")
        scenario = clext.Scenario.split(news, tasks=2, incremental="class")
        model = nn.Sequential(nn.EmbeddingBag(2**15, 64, padding_idx=0), nn.Linear(64, 4))

    Args:
        data: what `datasets.load_dataset` or `load_from_disk` returns (pip install 'clext[text]'):
            by the names of the parts, columns by theirs.
        text: the column of texts.
        label: the column of classes, integers from 0.
        train: the part to train on.
        test: the part to test on.
        length: tokens of an example; what is longer is cut, what is shorter padded with 0.
        vocabulary: how many ids there are. A word's id is its hash, from 1: two may share one.
        tokenizer: one of transformers in place of that, with its own vocabulary and padding.
        name: as in titles and results.

    Raises:
        ValueError: labels that are no integers from 0.
        KeyError: there is no such part or column.
    """
    ids = partial(_hashed, vocabulary=vocabulary)
    if tokenizer is not None:
        ids = partial(_tokenized, tokenizer=tokenizer)
    splits = [
        Split(ids(list(data[part][text]), length), _classes(list(data[part][label]), label, part))
        for part in (train, test)
    ]
    count = max(int(split.labels.max()) for split in splits) + 1
    return Dataset(name, splits[0], splits[1], count, "Hugging Face datasets")


def _hashed(texts: list[str], length: int, vocabulary: int) -> Tensor:
    """Words as scikit-learn finds them, in lower case and of two letters or more, by their hash."""
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.utils import murmurhash3_32

    words_of = HashingVectorizer().build_analyzer()
    ids = np.full((len(texts), length), _PADDING)
    for row, text in zip(ids, texts, strict=True):
        words = words_of(text)[:length]
        row[: len(words)] = [murmurhash3_32(w, positive=True) % (vocabulary - 1) + 1 for w in words]
    return torch.from_numpy(ids)


def _tokenized(texts: list[str], length: int, tokenizer: Tokenizer) -> Tensor:
    found = tokenizer(texts, truncation=True, padding="max_length", max_length=length)
    return torch.tensor(found["input_ids"])


def _classes(column: list[object], label: str, part: str) -> Tensor:
    if not all(isinstance(entry, int) and entry >= 0 for entry in column):
        raise ValueError(
            f"text_dataset: column {label!r} of part {part!r} must hold integers from 0; "
            f"data.class_encode_column({label!r}) makes them of other labels"
        )
    return torch.tensor(column)
