"""Networks that say exactly what the best network would, for data drawn from N(mean, std^2) in every pixel.

With x = A x_0 + S eps, E[x_0 | x] = (mean S^2 + std^2 A x) / (A^2 std^2 + S^2): no training is needed, and what a loss or a
sampler must give is known in closed form. Written from the papers' formulas, not from the package.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn


class Exact(nn.Module):
    """``clean`` is E[x_0 | x]; a label y moves the mean by y, and a dropped one does not."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.rows: list[int] = []  # of each call

    def clean(self, x: Tensor, signal: Tensor, noise: Tensor, y: Tensor | None, drop: Tensor | None) -> Tensor:
        self.rows.append(len(x))
        mean = torch.full_like(x, self.mean)
        if y is not None:
            shift = y.to(x.dtype).view(-1, 1, 1, 1)
            mean = mean + (shift if drop is None else torch.where(drop.view(-1, 1, 1, 1), 0.0, shift))
        s2 = self.std**2
        return (mean * noise**2 + s2 * signal * x) / (signal**2 * s2 + noise**2)


def column(t: Tensor) -> Tensor:
    return t.double().view(-1, 1, 1, 1)


class ExactFlow(Exact):
    """Predicts eps - x_0 on x = (1 - t) x_0 + t eps."""

    def forward(self, x, t, y=None, *, drop=None):
        t = column(t) / 1000
        x_0 = self.clean(x.double(), 1 - t, t, y, drop)
        return ((x - (1 - t) * x_0) / t - x_0).float()


def linear_abar() -> Tensor:
    """The released DiT's chain: 1,000 betas from 0.0001 to 0.02."""
    kept, out = 1.0, []
    for i in range(1000):
        kept *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        out.append(kept)
    return torch.tensor(out, dtype=torch.float64)


class ExactDDPM(Exact):
    """Predicts eps and, in a second half of the channels, a constant place of the variance."""

    def __init__(self, mean: float, std: float, place: float = 0.0) -> None:
        super().__init__(mean, std)
        self.place, self.abar = place, linear_abar()

    def forward(self, x, t, y=None, *, drop=None):
        # Between two whole steps, the noise over signal by its logarithm.
        logs = ((1 - self.abar) / self.abar).sqrt().log().numpy()
        sigma = column(torch.from_numpy(np.exp(np.interp(t.double().numpy(), np.arange(1000), logs))))
        abar = 1 / (1 + sigma**2)
        x_0 = self.clean(x.double(), abar.sqrt(), (1 - abar).sqrt(), y, drop)
        eps = (x - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return torch.cat([eps, torch.full_like(eps, self.place)], 1).float()


class ExactEDM(Exact):
    """Predicts the preconditioned F, sigma_data 0.5."""

    def forward(self, x, t, y=None, *, drop=None):
        sigma, data = (4 * column(t) / 1000).exp(), 0.5
        total = sigma**2 + data**2
        x = x.double() * total.sqrt()
        x_0 = self.clean(x, torch.ones_like(sigma), sigma, y, drop)
        return ((x_0 - data**2 / total * x) / (sigma * data / total.sqrt())).float()


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bits_of_divergence(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """KL(N(a) || N(b)) in bits."""
    a, b = torch.distributions.Normal(mean_a, var_a.sqrt()), torch.distributions.Normal(mean_b, var_b.sqrt())
    return torch.distributions.kl_divergence(a, b) / math.log(2)
