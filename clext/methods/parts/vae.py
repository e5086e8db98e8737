"""The generator of deep generative replay: a variational auto-encoder of plain layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clext.core.inputs import described
from clext.core.seeding import linear


class VAE(nn.Module):
    """A symmetric, fully connected variational auto-encoder of inputs in [0, 1], with ReLU.

    Kingma and Welling 2013, arXiv:1312.6114. The encoder goes from the inputs over the hidden
    layers to mean and logarithm of the variance of `latent` numbers; the decoder from there over
    the same widths backwards to the inputs, each the probability of a Bernoulli variable. The prior
    is the standard normal distribution.

    Args:
        shape: of one input.
        hidden: widths of the encoder's layers, from the inputs on.
        latent: numbers in the code of one input.
        random: draws the weights; by default torch's global generator.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int] = (400, 400),
        latent: int = 100,
        random: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        numbers = math.prod(self.shape)
        self.encoder = _layers((numbers, *hidden), random)
        self.mean = linear(hidden[-1], latent, random)
        self.log_variance = linear(hidden[-1], latent, random)
        self.decoder = _layers((latent, *reversed(hidden)), random)
        self.reconstruction = linear(hidden[0], numbers, random)

    def loss(self, inputs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The negative evidence lower bound, mean over the batch (0-dim, at least float32).

        Binary cross entropy of the reconstruction, summed over the numbers of an input, and the
        Kullback-Leibler divergence of its code from the prior.

        Args:
            inputs: in [0, 1], [N, *shape].
            generator: of the noise of the codes, on the CPU; None: torch's own.
        """
        flat = inputs.flatten(1).to(self.mean.weight.dtype)
        features = self.encoder(flat)
        mean, log_variance = _widened(self.mean(features)), _widened(self.log_variance(features))
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
        logits = _widened(self._decode(mean + (0.5 * log_variance).exp() * noise))
        bits = F.binary_cross_entropy_with_logits(logits, flat.to(logits.dtype), reduction="sum")
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
        return (bits + divergence) / len(inputs)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Inputs that the decoder makes of codes drawn from the prior, [count, *shape]."""
        like = self.mean.weight
        shape = (count, self.mean.out_features)
        codes = torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
        return torch.sigmoid(_widened(self._decode(codes))).view(count, *self.shape)

    def _decode(self, codes: Tensor) -> Tensor:
        logits: Tensor = self.reconstruction(self.decoder(codes))
        return logits


def _layers(widths: Sequence[int], random: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [linear(inputs, outputs, random), nn.ReLU()]
    return nn.Sequential(*layers)


def _widened(values: Tensor) -> Tensor:
    """Out of half precision, where a sum over pixels would be a coarse one."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_generator(owner: str, generator: object) -> nn.Module:
    """`generator` if it is a module that can learn, with a loss and samples; else ValueError."""
    lacking = [name for name in ("loss", "sample") if not callable(getattr(generator, name, None))]
    if not isinstance(generator, nn.Module) or lacking:
        got = type(generator).__name__ + (f" without {' and '.join(lacking)}" if lacking else "")
        raise ValueError(
            f"{owner}: generator must be a torch.nn.Module with loss(inputs) and sample(count, "
            f"generator), got {got}; leave it out for a variational auto-encoder"
        )
    if not any(parameter.requires_grad for parameter in generator.parameters()):
        raise ValueError(f"{owner}: generator has no trainable parameter")
    return generator


def check_inputs(owner: str, generator: nn.Module, inputs: Tensor) -> None:
    """ValueError unless `inputs` are what a generator can learn: in [0, 1] for a `VAE`, or finite.

    Looks at the numbers, so it waits for the device.
    """
    bounded = isinstance(generator, VAE)
    expected = "numbers in [0, 1]" if bounded else "finite numbers"
    if not inputs.is_floating_point():
        least, most = (-math.inf, math.inf) if bounded else (0.0, 1.0)
    else:
        least, most = torch.stack(inputs.detach().aminmax()).tolist()
    fits = least >= 0 and most <= 1 if bounded else math.isfinite(least + most)
    if not fits:
        raise ValueError(
            f"{owner}: inputs are {inputs.dtype} between {least:g} and {most:g}, and the generator "
            f"expects {expected}; scale them, or pass a generator of your own"
        )


def sample_like(
    owner: str, generator: nn.Module, inputs: Tensor, random: torch.Generator
) -> Tensor:
    """As many samples as there are inputs; ValueError if they are not like these."""
    with torch.no_grad():
        samples = generator.sample(len(inputs), random)  # type: ignore[operator]
    if not isinstance(samples, Tensor) or samples.shape != inputs.shape:
        raise ValueError(
            f"{owner}: sample({len(inputs)}, ...) of the generator returned {described(samples)}, "
            f"expected {list(inputs.shape)} like the inputs"
        )
    return samples.to(inputs)


def generator_loss(
    owner: str, generator: nn.Module, inputs: Tensor, random: torch.Generator
) -> Tensor:
    """What the generator is to make smaller; ValueError if that is no 0-dim tensor."""
    noise = (random,) if isinstance(generator, VAE) else ()
    loss = generator.loss(inputs, *noise)  # type: ignore[operator]
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError(
            f"{owner}: loss(inputs) of the generator returned {described(loss)}, expected 0-dim"
        )
    return loss
