"""The models that have a name: the course's perceptron, and three for images."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from clext.core.checks import unknown_name
from clext.core.names import MODELS
from clext.core.seeding import generator, isolated_rng, linear

COURSE = (1024, 512, 256)
# What a model's layers come from, beyond torch; and how to get it.
_LIBRARIES = {
    "resnet18": ("torchvision", "pip install 'clext[vision]'"),
    "vit_tiny": ("timm", "pip install timm"),
}


class ImageModel(nn.Sequential):
    """A model made by name, which results record; flattened examples become images first."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.name = name


def mlp(
    in_features: int = 784,
    out_features: int = 10,
    random: torch.Generator | None = None,
    hidden: Sequence[int] = COURSE,
) -> nn.Sequential:
    """The course's multilayer perceptron: 1024, 512 and 256 hidden units with ReLU.

    Args:
        in_features: numbers in one flattened example.
        out_features: number of classes.
        random: draws the weights; by default torch's global generator.
        hidden: other widths.

    Returns:
        A module from [N, in_features] to logits [N, out_features].
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((in_features, *hidden, out_features)):
        layers += [linear(inputs, outputs, random), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def hidden_widths(name: str) -> list[int] | None:
    """The hidden widths in "mlp" or "mlp-400-400", None for a model of images.

    Raises:
        ValueError: an unknown name, or one whose library cannot be imported.
    """
    kind, *widths = name.split("-")
    if name in MODELS and name != "mlp":
        library, remedy = _LIBRARIES.get(name, ("torch", ""))
        try:
            importlib.import_module(library)
        except Exception as error:  # torchvision beside another torch fails in many ways
            raise ValueError(
                f"train: model {name!r} needs {library}, which cannot be imported ({error}); "
                f"{remedy}"
            ) from error
        return None
    if kind != "mlp" or not all(width.isdecimal() and int(width) > 0 for width in widths):
        raise unknown_name("model", name, [*MODELS, "mlp-400-400"])
    return [int(width) for width in widths] or [*COURSE]


def named_model(name: str, shape: Sequence[int], outputs: int, seed: int) -> nn.Module:
    """The model called `name`, its weights drawn from `seed`.

    Args:
        name: "mlp" (or with other hidden widths, "mlp-400-400"), "cnn", "resnet18", "vit_tiny".
        shape: of one example; models of images take [C, H, W], or square grey images, flattened.
        outputs: number of logits.
        seed: for a perceptron of a generator of its own, else of torch's global one, which is
            afterwards as it was.

    Raises:
        ValueError: as in `hidden_widths`, or the examples are no images that it can take.
    """
    hidden = hidden_widths(name)
    if hidden is not None:
        model = mlp(math.prod(shape), outputs, generator(seed), hidden)
        return model if len(shape) == 1 else nn.Sequential(nn.Flatten(), *model)
    side = math.isqrt(math.prod(shape))
    image = (1, side, side) if len(shape) == 1 else tuple(shape)
    if len(image) != 3 or math.prod(image) != math.prod(shape):
        raise ValueError(
            f"train: model {name!r} takes images [C, H, W], or square grey ones in a row, got "
            f"examples of shape {list(shape)}; use 'mlp'"
        )
    with isolated_rng(seed, torch.device("cpu")):
        layers = _MAKERS[name](*image, outputs)
    first = [nn.Unflatten(1, image)] if len(shape) == 1 else []
    return ImageModel(name, *first, *layers)


def _cnn(channels: int, height: int, width: int, outputs: int) -> list[nn.Module]:
    """That of Zenke et al. 2017 (arXiv:1703.04200) for CIFAR-10, without its dropout.

    Twice two 3x3 convolutions (of 32, then of 64 channels, all padded) and a pooling; 512 hidden.
    """
    layers: list[nn.Module] = []
    for inputs, count in ((channels, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, count, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(count, count, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features = 64 * (height // 4) * (width // 4)
    return [*layers, nn.Flatten(), nn.Linear(features, 512), nn.ReLU(), nn.Linear(512, outputs)]


def _resnet18(channels: int, _height: int, _width: int, outputs: int) -> list[nn.Module]:
    """ResNet-18 (He et al. 2015, arXiv:1512.03385) for images of 32x32, as the field has it.

    Its first convolution is 3x3 without stride, and no pooling follows; 64 to 512 channels.
    """
    from torchvision.models import resnet18

    model = resnet18(num_classes=outputs)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as the rest
    model.maxpool = nn.Identity()
    return [model]


def _vit_tiny(channels: int, height: int, width: int, outputs: int) -> list[nn.Module]:
    """ViT-Tiny (Touvron et al. 2021, arXiv:2012.12877), with patches of 4x4."""
    if height % 4 or width % 4:
        raise ValueError(
            f"train: model 'vit_tiny' takes images whose sides are multiples of 4, got {height} x "
            f"{width}"
        )
    import timm

    return [
        timm.create_model(
            "vit_tiny_patch16_224",
            img_size=(height, width),
            patch_size=4,
            in_chans=channels,
            num_classes=outputs,
        )
    ]


_MAKERS = {"cnn": _cnn, "resnet18": _resnet18, "vit_tiny": _vit_tiny}
