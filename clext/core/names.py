"""The names that options take, known without torch: the command line checks and lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from clext.core.checks import unknown_name

DATASETS = (
    *("auto", "mnist", "fashion_mnist", "kmnist", "emnist"),
    *("cifar10", "cifar100", "svhn", "tiny_imagenet", "omniglot", "digits"),
)
# As in the titles of pictures.
TITLES = {
    "mnist": "MNIST",
    "fashion_mnist": "Fashion-MNIST",
    "kmnist": "KMNIST",
    "emnist": "EMNIST",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "svhn": "SVHN",
    "tiny_imagenet": "Tiny ImageNet",
    "omniglot": "Omniglot",
}
SCENARIOS = ("permuted", "rotated", "split")
INCREMENTAL = ("domain", "task", "class")
OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULERS = ("cosine", "step", "one-cycle")
LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
PRECISIONS = ("fp32", "bf16")
TRANSFORMS = ("crop-flip",)
MODELS = ("mlp", "cnn", "resnet18", "vit_tiny")

# The options of each method, as its class has them (a test compares).
METHOD_OPTIONS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "l2": ("strength", "state_dtype"),
    "ewc": (
        "strength",
        "fisher",
        "gamma",
        "anchors",
        "weighting",
        "samples",
        "seed",
        "state_dtype",
    ),
    "kfac": ("strength", "fisher", "samples", "seed"),
    "mas": ("strength", "gamma", "estimator", "samples", "state_dtype"),
    "si": ("strength", "xi", "clamp", "state_dtype"),
    "rwalk": ("strength", "alpha", "interval", "eps", "mix", "variant", "state_dtype"),
    "scp": ("strength", "slices", "samples", "seed", "state_dtype"),
    "lwf": ("strength", "balance", "temperature", "scale"),
    "replay": ("strength", "budget", "policy", "batch", "balance", "seed"),
    "der": ("strength", "beta", "budget", "batch", "seed"),
    "derpp": ("strength", "beta", "budget", "batch", "seed"),
    "er-ace": ("strength", "budget", "batch", "seed"),
    "icarl": ("budget", "features", "norm", "temperature"),
    "dgr": (
        *("strength", "balance", "distill", "temperature", "scale"),
        *("hidden", "latent", "generator", "generator_lr", "seed"),
    ),
    "gem": ("per_task", "margin", "ridge", "seed"),
    "agem": ("per_task", "batch", "seed"),
    "joint": (),
}
# The course's six. The others need a memory, a generator or all the data, or take far longer.
DEFAULT_METHODS = ("baseline", "ewc", "mas", "si", "rwalk", "scp")


def part_names(method: str | Sequence[str]) -> list[str]:
    """The names in "ewc", "ewc+replay" or ["ewc", "replay"].

    ValueError for an unknown one (with the nearest valid name), a missing one, or more than two.
    """
    if isinstance(method, type) or not isinstance(method, str | Iterable):
        got = f"the class {method.__name__}" if isinstance(method, type) else type(method).__name__
        raise ValueError(
            f"method: expected a name such as 'ewc', two names to combine, or an instance, got "
            f"{got}"
        )
    names: list[str] = method.split("+") if isinstance(method, str) else list(method)
    names = [name.strip().lower() if isinstance(name, str) else name for name in names]
    if "" in names:
        raise ValueError(
            f"method: a name is missing in {method!r}; expected one, such as 'ewc' (or 'derpp', "
            "for DER++), or two to combine, such as 'ewc+replay'"
        )
    for name in names:
        if not isinstance(name, str) or name not in METHOD_OPTIONS:
            words = re.findall(r"\w+", str(name))
            if len(words) > 1 and set(words) <= METHOD_OPTIONS.keys():
                combine = f"to combine the two write {'+'.join(words)!r}, " * (len(words) == 2)
                raise ValueError(
                    f"unknown method {name!r}; {combine}to run one after the other use "
                    f"clext compare --methods {','.join(words)} or clext.compare({words})"
                )
            raise unknown_name("method", name, METHOD_OPTIONS)
    if not 1 <= len(names) <= 2:
        raise ValueError(f"method: expected one name or two to combine, got {len(names)}: {names}")
    return names
