"""Parameter shapes of the models that the benchmarks use; no weights, no model library."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

Shapes = list[tuple[int, ...]]


def course_mlp() -> Shapes:
    """784-1024-512-256-10, the multilayer perceptron of the course: 1.46 M parameters."""
    widths = [784, 1024, 512, 256, 10]
    shapes: Shapes = []
    for inputs, outputs in pairwise(widths):
        shapes += [(outputs, inputs), (outputs,)]
    return shapes


def resnet18() -> Shapes:
    """ResNet-18 for 1,000 classes (He et al. 2016): 11.7 M parameters in 62 tensors."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,)]
            shapes += [(width, width, 3, 3), (width,), (width,)]
            if channels != width:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (1000, 512), (1000,)]


def vit_b() -> Shapes:
    """ViT-B/16 without head (Dosovitskiy et al. 2021): 85.8 M parameters in 150 tensors."""
    width, hidden = 768, 3072
    shapes: Shapes = [(1, 1, width), (1, 197, width), (width, 3, 16, 16), (width,)]
    for _ in range(12):
        shapes += [(width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,)]
        shapes += [(width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,)]
    return [*shapes, (width,), (width,)]


MODELS = {"mlp": course_mlp, "resnet18": resnet18, "vit_b": vit_b}


def on_devices(models: Iterable[str], devices: Iterable[str]) -> list[tuple[str, str]]:
    """Each model on each device; the MLP not on CUDA, where it fits into the L2 of a large GPU.

    `bench/gpu.py` has it there, in several sets of buffers.
    """
    models = list(models)
    return [
        (model, device)
        for device in devices
        for model in models
        if (model, device) != ("mlp", "cuda")
    ]
