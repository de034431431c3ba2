"""The diffusion objectives: DDPM with epsilon prediction and learned variance, as the released DiT, and EDM.

Both are the path ``x_0 + sigma eps`` to the samplers: DDPM divides its ``sqrt(abar) x_0 + sqrt(1 - abar) eps`` by the
root of abar, so ``sigma = sqrt((1 - abar) / abar)``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditscale.dit.checks import need_choice, need_flag, need_number, need_whole
from ditscale.dit.objective import TIME_SCALE, Objective, Prediction, mean_per_sample, per_sample
from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig

SCHEDULES = ("linear", "cosine")
# Data are pictures of 8 bits in [-1, 1]: a grey level is this wide.
_GREY_LEVEL = 2 / 255
# The chain's tables hold every step.
_MOST_STEPS = 100_000


class Chain(NamedTuple):
    """A DDPM's noise schedule, float64 [T] each: share of signal left, and noise over signal."""

    abar: Tensor
    sigma: Tensor


@functools.lru_cache(maxsize=8)
def noise_chain(timesteps: int, schedule: str) -> Chain:
    """The schedule's tables; "linear" betas of Ho et al. (arXiv:2006.11239), "cosine" abar of Nichol & Dhariwal."""
    if schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * (1000 / timesteps)
        abar = torch.cumprod(1 - betas.clamp(max=0.999), 0)
    else:
        edges = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        curve = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
        abar = torch.cumprod((curve[1:] / curve[:-1]).clamp(min=0.001), 0)
    return Chain(abar, ((1 - abar) / abar).sqrt())


@dataclass(frozen=True)
class DDPM(Objective):
    """Noise prediction on a chain of T steps (Ho et al., arXiv:2006.11239), by default with the hybrid loss.

    Args:
        timesteps: T, 2 to 100,000. Default: 1000.
        schedule: "linear" or "cosine". Default: "linear", as the released DiT.
        learn_sigma: the second half of the output channels says where each log-variance lies between its bounds, and
            the variational bound (bits per dimension, with the mean detached) is added to the squared error of the
            noise (Nichol & Dhariwal, arXiv:2102.09672). Must be as the model's. Default: True.

    Raises:
        InputError: a value is not possible.
    """

    name: ClassVar[str] = "ddpm"

    timesteps: int = 1000
    schedule: str = "linear"
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        need_whole("timesteps", self.timesteps, 2, _MOST_STEPS)
        need_choice("schedule", self.schedule, SCHEDULES)
        need_flag("learn_sigma", self.learn_sigma)

    @property
    def record_name(self) -> str:
        """The objective in run records."""
        return "ddpm_epsilon"

    @property
    def loss_kind(self) -> str:
        """What the loss measures."""
        return "epsilon_mse_plus_vlb_bits" if self.learn_sigma else "epsilon_mse"

    def check_model(self, config: DiTConfig) -> None:
        """The model must have channels for the variance exactly where it is learned."""
        if config.learn_sigma != self.learn_sigma:
            raise InputError(f"objective.learn_sigma: expected {config.learn_sigma}, as the model's, got the other")

    @property
    def chain(self) -> Chain:
        """The noise schedule."""
        return noise_chain(self.timesteps, self.schedule)

    def quantile(self, u: Tensor) -> Tensor:
        """Whole steps 0 to T - 1, all equally likely."""
        return (u.double() * self.timesteps).floor().clamp(0, self.timesteps - 1).float()

    def _ask(self, model: nn.Module, x_t: Tensor, t: Tensor, y: Any, drop: Tensor | None) -> tuple[Tensor, Tensor]:
        """Noise and, where it is learned, the variance's place, 0 to 1; t counted in steps, fractions allowed."""
        # The time stays float32 for a model of bfloat16, which would read 997 as 996.
        out = model(x_t, (t * (TIME_SCALE / self.timesteps)).float(), y, drop=drop).float()
        if self.learn_sigma and out.shape[1] != 2 * x_t.shape[1]:
            raise InputError(
                f"objective.learn_sigma: expected a model of {2 * x_t.shape[1]} output channels, the variance's among them, "
                f"got {out.shape[1]}"
            )
        eps, variance = out[:, : x_t.shape[1]], out[:, x_t.shape[1] :]
        return eps, (variance + 1) / 2

    def loss(self, model: nn.Module, x_0: Tensor, y: Any, eps: Tensor, t: Tensor, drop: Tensor | None = None) -> Tensor:
        """Squared error of the noise, plus the variational bound in bits where the variance is learned."""
        abar = self.chain.abar.to(t.device)[t.long()]
        x_t = per_sample(abar.sqrt(), x_0) * x_0 + per_sample((1 - abar).sqrt(), x_0) * eps
        guess, share = self._ask(model, x_t, t, y, drop)
        loss = mean_per_sample((guess - eps.float()).square())
        if not self.learn_sigma:
            return loss
        return loss + self._bound(x_0.float(), x_t.float(), t.long(), guess.detach(), share)

    def _bound(self, x_0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, share: Tensor) -> Tensor:
        """One term of the variational bound, bits per dimension, [B].

        On the way to the data it is a likelihood of grey levels, elsewhere the divergence of the step from the
        posterior q(x_{t-1} | x_t, x_0).
        """
        abar = self.chain.abar.to(t.device)
        before = torch.cat([abar.new_ones(1), abar])[t]
        abar = abar[t]
        beta = 1 - abar / before
        tilde = beta * (1 - before) / (1 - abar)
        # The first step has no posterior variance; the second's stands in for its logarithm.
        first = (1 - self.chain.abar[1] / self.chain.abar[0]) * (1 - self.chain.abar[0]) / (1 - self.chain.abar[1])
        low, high = torch.where(t == 0, first.to(t.device), tilde).log(), beta.log()
        log_variance = per_sample(low, x_0) + share * per_sample(high - low, x_0)
        clean = (x_t - per_sample((1 - abar).sqrt(), x_0) * eps) / per_sample(abar.sqrt(), x_0)
        weight = per_sample(before.sqrt() * beta / (1 - abar), x_0)
        rest = per_sample((abar / before).sqrt() * (1 - before) / (1 - abar), x_0) * x_t
        mean = weight * clean + rest
        exact = weight * x_0 + rest
        low = per_sample(low, x_0)
        divergence = 0.5 * (
            log_variance - low - 1 + (low - log_variance).exp() + (exact - mean).square() * (-log_variance).exp()
        )
        nats = torch.where(per_sample(t == 0, x_0).bool(), -grey_log_likelihood(x_0, mean, log_variance), divergence)
        return mean_per_sample(nats) / math.log(2)

    def signal(self, u: Tensor) -> Tensor:
        """The path is divided by its signal."""
        return torch.ones_like(u)

    def time_of(self, u: Tensor) -> Tensor:
        """The step at which noise over signal is u, float64; between two steps by the logarithm."""
        logs = self.chain.sigma.log().to(u.device)
        wanted = u.double().log().clamp(logs[0], logs[-1])
        above = torch.searchsorted(logs, wanted).clamp(1, len(logs) - 1)
        share = (wanted - logs[above - 1]) / (logs[above] - logs[above - 1])
        return above - 1 + share

    def predict(self, model: nn.Module, z: Tensor, u: Tensor, y: Any, *, drop: Tensor | None = None) -> Prediction:
        """The slope of ``x_0 + u eps`` is the noise."""
        scale = per_sample((1 + u.double().square()).rsqrt(), z)
        eps, share = self._ask(model, z * scale, self.time_of(u), y, drop)
        return Prediction(eps, share if self.learn_sigma else None)

    def levels(self, steps: int, shift: float = 1.0) -> Tensor:
        """Noise over signal at ``steps`` evenly spaced steps of the chain, from the last to the first, then 0."""
        if steps > self.timesteps:
            raise InputError(f"steps: expected at most the chain's {self.timesteps}, got {steps}")
        if shift != 1:
            raise InputError(f"shift: expected 1 for a chain of whole steps, got {shift}")
        last = self.timesteps - 1
        kept = torch.linspace(last, 0, steps, dtype=torch.float64).round().long() if steps > 1 else torch.tensor([last])
        return torch.cat([self.chain.sigma[kept], torch.zeros(1, dtype=torch.float64)])

    def variance_bounds(self, u: Tensor, u_next: Tensor) -> tuple[Tensor, Tensor]:
        """The chain's own bounds: beta-tilde and beta of the step, over the signal that is left after it."""
        low, added = super().variance_bounds(u, u_next)
        return low, added * (1 + u_next.square()) / (1 + u.square())


def grey_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability, in nats, of the grey level x in [-1, 1] under a normal distribution; ends take the tails."""
    inverse = (-0.5 * log_variance).exp()
    upper = torch.special.ndtr((x - mean + _GREY_LEVEL / 2) * inverse)
    lower = torch.special.ndtr((x - mean - _GREY_LEVEL / 2) * inverse)
    upper = torch.where(x > 1 - _GREY_LEVEL / 4, 1.0, upper)
    lower = torch.where(x < -1 + _GREY_LEVEL / 4, 0.0, lower)
    return (upper - lower).clamp(min=1e-12).log()


@dataclass(frozen=True)
class EDM(Objective):
    """Preconditioned denoising (Karras et al., arXiv:2206.00364, table 1): ``D = c_skip x + c_out F(c_in x, c_noise)``.

    The network F sees inputs and learns targets of unit variance at every noise level; the loss is the squared error of
    the denoised image, weighted so that the network's own error counts alike everywhere. Training noise is
    ``ln sigma ~ normal``. The time given to the model is ``1000 ln(sigma) / 4``: the DiT's sines were made for that range.

    Args:
        sigma_data: standard deviation of the data. Default: 0.5.
        log_mean, log_std: of ln sigma in training. Default: -1.2 and 1.2.
        sigma_min, sigma_max, rho: of the sampler's levels. Default: 0.002, 80 and 7.

    Raises:
        InputError: a value is not possible.
    """

    name: ClassVar[str] = "edm"

    sigma_data: float = 0.5
    log_mean: float = -1.2
    log_std: float = 1.2
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        need_number("log_mean", self.log_mean)
        for field in ("sigma_data", "log_std", "sigma_min", "rho"):
            need_number(field, getattr(self, field), above=0)
        need_number("sigma_max", self.sigma_max, above=self.sigma_min)

    @property
    def record_name(self) -> str:
        """The objective in run records."""
        return "edm"

    @property
    def loss_kind(self) -> str:
        """What the loss measures."""
        return "edm_weighted_mse"

    def quantile(self, u: Tensor) -> Tensor:
        """Log-normal noise levels."""
        return torch.exp(self.log_mean + self.log_std * torch.special.ndtri(u.double())).float()

    def denoise(self, model: nn.Module, x: Tensor, sigma: Tensor, y: Any, *, drop: Tensor | None = None) -> Tensor:
        """The denoised image D(x; sigma) for x [B, C, ...] and sigma [B]: [B, C, ...] float32."""
        s = sigma.double()
        total = s.square() + self.sigma_data**2
        time = (0.25 * TIME_SCALE * s.log()).float()  # for a model of bfloat16 too, which would round it
        out = model(x * per_sample(total.rsqrt(), x), time, y, drop=drop)[:, : x.shape[1]].float()
        skip, scale = self.sigma_data**2 / total, s * self.sigma_data * total.rsqrt()
        return per_sample(skip, out) * x + per_sample(scale, out) * out

    def loss(self, model: nn.Module, x_0: Tensor, y: Any, eps: Tensor, t: Tensor, drop: Tensor | None = None) -> Tensor:
        """Weighted squared error of the denoised image of each sample; ``t`` is sigma."""
        denoised = self.denoise(model, x_0 + per_sample(t, x_0) * eps, t, y, drop=drop)
        s = t.double()
        weight = (s.square() + self.sigma_data**2) / (s * self.sigma_data).square()
        return weight.float() * mean_per_sample((denoised - x_0.float()).square())

    def signal(self, u: Tensor) -> Tensor:
        """All of the data is left."""
        return torch.ones_like(u)

    def predict(self, model: nn.Module, z: Tensor, u: Tensor, y: Any, *, drop: Tensor | None = None) -> Prediction:
        """The slope of ``x_0 + u eps`` is the noise that the denoised image leaves."""
        return Prediction((z - self.denoise(model, z, u, y, drop=drop)) / per_sample(u, z))

    def levels(self, steps: int, shift: float = 1.0) -> Tensor:
        """From sigma_max to sigma_min evenly in sigma^(1 / rho), then 0; float64."""
        share = torch.linspace(0, 1, steps, dtype=torch.float64)
        ends = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        sigma = (ends[0] + share * (ends[1] - ends[0])) ** self.rho
        return torch.cat([shift * sigma, torch.zeros(1, dtype=torch.float64)])
