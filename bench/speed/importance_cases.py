"""Models of the kinds that importances are measured for, all of them small enough for one core."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from clext.training.models import mlp

CLASSES = 10
VOCABULARY, WIDTH, LENGTH = 1000, 128, 32


def cnn() -> nn.Module:
    """Two convolutions and two linear layers for 3 x 32 x 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(4096, 128),
        nn.ReLU(),
        nn.Linear(128, CLASSES),
    )


class Block(nn.Module):
    """Two convolutions with batch normalisation around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.first_norm(self.first(x)))
        return functional.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


def resnet() -> nn.Module:
    """A residual net for 3 x 32 x 32: 16, 32 and 64 channels, two blocks each."""
    widths = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Block(*width) for width in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


class TokenMixer(nn.Module):
    """Embedding, residual blocks of LayerNorm and two linear layers on each token, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )
            for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden.mean(1))


class Recurrent(nn.Module):
    """An LSTM over rows of a picture, and the mean of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(64, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.cell(rows)[0].mean(1))


class Encoder(nn.Module):
    """Two layers of nn.TransformerEncoder, whose attention is nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, batch_first=True)
        self.embedding = nn.Linear(64, WIDTH)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(rows)).mean(1))


def by_timm(name: str, **options: object) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=CLASSES, **options)


class Text(nn.Module):
    """A model of Transformers, given its words alone; of a language model, the last one counts."""

    def __init__(self, family: str, task: str, **options: object) -> None:
        super().__init__()
        import transformers

        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCABULARY, num_labels=CLASSES, pad_token_id=0, **options
        )
        self.model = getattr(transformers, family + task)(config)

    def forward(self, words: Tensor) -> Tensor:
        logits = self.model(input_ids=words).logits
        return logits if logits.dim() == 2 else logits[:, -1]


BERT = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
GPT2 = {"n_embd": 256, "n_layer": 4, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {**BERT, "intermediate_size": 688, "num_key_value_heads": 2}


def tokens(samples: int) -> Tensor:
    return torch.randint(1, VOCABULARY, (samples, LENGTH))


def pictures(samples: int) -> Tensor:
    return torch.rand(samples, 3, 32, 32)


def larger_pictures(samples: int) -> Tensor:
    return torch.rand(samples, 3, 64, 64)


def rows(samples: int) -> Tensor:
    return torch.rand(samples, LENGTH, 64)


@dataclass(frozen=True)
class Case:
    """A model, inputs for it, and a task: how many batches of what size."""

    model: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    batch: int
    batches: int


# As many batches as a task of Permuted MNIST has (60,000 images), or of Split CIFAR-10 (10,000);
# of what is larger, 512 examples.
CASES = {
    "mlp": Case(mlp, lambda samples: torch.rand(samples, 784), 128, 469),
    "cnn": Case(cnn, pictures, 128, 79),
    "resnet": Case(resnet, pictures, 64, 157),
    "tokens": Case(TokenMixer, tokens, 64, 157),
    "lstm": Case(Recurrent, rows, 16, 32),
    "attention": Case(Encoder, rows, 16, 32),
    "resnet18": Case(partial(by_timm, "resnet18", zero_init_last=False), pictures, 16, 32),
    "vit": Case(
        partial(by_timm, "vit_tiny_patch16_224", img_size=64, patch_size=8, depth=4),
        larger_pictures,
        16,
        32,
    ),
    "convnext": Case(partial(by_timm, "convnext_atto"), larger_pictures, 16, 32),
    "bert": Case(partial(Text, "Bert", "ForSequenceClassification", **BERT), tokens, 16, 32),
    "gpt2": Case(partial(Text, "GPT2", "LMHeadModel", **GPT2), tokens, 16, 32),
    "llama": Case(partial(Text, "Llama", "ForSequenceClassification", **LLAMA), tokens, 16, 32),
}
