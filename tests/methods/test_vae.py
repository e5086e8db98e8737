"""The variational auto-encoder of DGR: `clext.methods.parts.vae`."""

from __future__ import annotations

import math

import pytest
import torch

from clext.methods.parts.vae import VAE


def make(device, shape=(2, 3), **options):
    torch.manual_seed(1)
    return VAE(shape, **{"hidden": (8, 6), "latent": 4, **options}).to(device).double()


def test_the_loss_is_the_negative_bound_number_by_number(device):
    vae = make(device)
    inputs = torch.rand(3, 2, 3, dtype=torch.float64).to(device)
    loss = vae.loss(inputs, torch.Generator().manual_seed(7))

    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    total = 0.0
    for x, eps in zip(inputs.flatten(1), noise.to(device), strict=True):
        hidden = x
        for layer in (vae.encoder[0], vae.encoder[2]):
            hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
        mu = vae.mean.weight @ hidden + vae.mean.bias
        log_var = vae.log_variance.weight @ hidden + vae.log_variance.bias
        hidden = mu + (log_var / 2).exp() * eps
        for layer in (vae.decoder[0], vae.decoder[2]):
            hidden = (layer.weight @ hidden + layer.bias).clamp(min=0)
        p = torch.sigmoid(vae.reconstruction.weight @ hidden + vae.reconstruction.bias)
        for target, probability in zip(x.tolist(), p.tolist(), strict=True):
            total -= target * math.log(probability) + (1 - target) * math.log(1 - probability)
        for m, v in zip(mu.tolist(), log_var.tolist(), strict=True):
            total -= 0.5 * (1 + v - m * m - math.exp(v))
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(total / 3, rel=1e-10)


def test_is_symmetric():
    vae = make("cpu", (10,), hidden=(8, 6))
    widths = [(m.in_features, m.out_features) for m in vae.modules() if hasattr(m, "in_features")]
    assert widths == [(10, 8), (8, 6), (6, 4), (6, 4), (4, 6), (6, 8), (8, 10)]


def test_samples_have_the_shape_of_inputs_and_are_those_of_the_generator(device):
    vae = make(device)
    samples = [vae.sample(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert samples[0].shape == (5, 2, 3)
    assert bool(((samples[0] > 0) & (samples[0] < 1)).all())
    assert not samples[0].requires_grad
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_learns_what_inputs_look_like(device):
    """Two patterns: each sample becomes like one of them."""
    torch.manual_seed(0)
    patterns = torch.tensor([[1.0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]]).to(device)
    vae = VAE((6,), (32,), 2).to(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        vae.loss(patterns.repeat(16, 1)).backward()
        optimizer.step()
    samples = vae.sample(200, torch.Generator().manual_seed(0))
    distances = (samples[:, None] - patterns).abs().amax(2)
    assert (distances.min(1).values < 0.2).float().mean() > 0.7
    assert (distances < 0.2).float().mean(0).min() > 0.1  # neither of them alone


def test_losses_are_float32_under_autocast(device):
    vae = make(device).float()
    with torch.autocast(device, torch.bfloat16):
        loss = vae.loss(torch.rand(3, 2, 3, device=device))
        samples = vae.sample(3)
    assert loss.dtype == samples.dtype == torch.float32
