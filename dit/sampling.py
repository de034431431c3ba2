"""From noise to images: deterministic and stochastic samplers for every objective, with classifier-free guidance.

All of them walk the linear path ``z = a(u) x_0 + u eps`` of :mod:`ditscale.dit.objective`, where the model gives the
slope ``dz/du``. Noise levels that a user names are shares of noise, ``u / (a + u)``: 0 for data, 1 for noise, the time of
rectified flow, and ``sigma / (1 + sigma)`` for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ditscale.dit.checks import is_whole, need_choice, need_number
from ditscale.dit.condition import each
from ditscale.dit.diffusion import DDPM
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.objective import Objective, Prediction
from ditscale.dit.seeds import seed_for
from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig
    from ditscale.dit.rundata import RunData

STEPS = 25
_MOST_STEPS = 100_000
_ROUNDING = 1e-6
SAMPLERS = ("euler", "heun", "ddim", "ddpm")


@dataclass(frozen=True)
class Churn:
    """Noise that a step adds before it removes more (Karras et al., arXiv:2206.00364, algorithm 2).

    Args:
        amount: S_churn, spread over the steps. Default: 40.
        least, most: S_tmin and S_tmax, of sigma (noise over signal). Default: 0.05 and 50.
        noise: S_noise, the added noise's standard deviation. Default: 1.003.
    """

    amount: float = 40.0
    least: float = 0.05
    most: float = 50.0
    noise: float = 1.003

    def __post_init__(self) -> None:
        for field in ("amount", "least", "noise"):
            need_number(f"churn.{field}", getattr(self, field), least=0)
        # Infinity is how the paper writes that there is no greatest.
        if isinstance(self.most, bool) or not isinstance(self.most, (int, float)) or not self.most >= self.least:
            raise InputError(f"churn.most: expected a number of at least {self.least:g}, got {self.most!r}")


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    noise: Tensor,
    y: Any = None,
    *,
    objective: Objective | None = None,
    steps: int | None = None,
    sampler: str = "heun",
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guided_channels: int | None = None,
    clip: float | None = None,
    shift: float = 1.0,
    eta: float = 0.0,
    churn: Churn | None = None,
    seed: int | Sequence[int] = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Follow the path from noise to images; equal arguments give equal images.

    Args:
        model: called as ``model(x, t, y, drop=...)`` with x in the type of its weights; its first C channels are the
            prediction.
        noise: [B, C, ...] standard normal.
        y: the condition as the model takes it (a tensor, or a tuple of tensors, with one row a sample), or None.
        objective: that the model was trained with. Default: ``RectifiedFlow()``.
        steps: at least 1. Default: that of :func:`default_steps`.
        sampler: "euler" (one evaluation a step), "heun" (two; the last step one; with EDM that paper's algorithm 1),
            "ddim" (one; arXiv:2010.02502) or "ddpm" (one; ancestral, with the variance that the model learned or else
            the posterior's). Default: "heun".
        guidance: classifier-free guidance weight w in ``s_none + w (s_y - s_none)``; 1 means none and costs half. A model
            with ``config.guidance_embed`` is told it instead, at no cost. Default: 1.0.
        guidance_interval: least and greatest share of noise at which to guide, both included (arXiv:2404.07724).
            Default: all.
        guided_channels: guide the first so many channels only; the released DiT guides 3 of 4. Default: all.
        clip: clamp the estimated clean image to [-clip, clip] at every step: 1 for pixels, where a network that predicts
            noise knows little of the image at first (Ho et al., arXiv:2006.11239, use it). Default: None.
        shift: > 1 spends more steps at high noise, ``t' = shift t / (1 + (shift - 1) t)``. Default: 1.0.
        eta: noise of "ddim", from 0 (deterministic) to 1 (as much as the posterior). Default: 0.0.
        churn: noise for "euler" and "heun". Default: None.
        seed: of the noise that stochastic samplers add, which is another than ``noise`` even where that was drawn with the
            same seed. One for each sample: none then depends on what is drawn beside it. Default: 0.
        progress: called with (steps done, steps). Default: None.

    Returns:
        [B, C, ...] float32, not clipped.

    Raises:
        InputError: an argument is out of range, or guidance is asked for without a condition.
    """
    objective = objective or RectifiedFlow()
    steps = default_steps(objective) if steps is None else steps
    if noise.ndim < 2 or len(noise) == 0:
        raise InputError(f"noise: expected shape [B, C, ...] with B >= 1, got {list(noise.shape)}")
    if not is_whole(steps, 1, _MOST_STEPS):
        raise InputError(f"steps: expected at least 1 and at most {_MOST_STEPS:,}, got {steps!r}")
    need_sampler(sampler)
    need_number("guidance", guidance)
    if guided_channels is not None and not is_whole(guided_channels, 1, noise.shape[1]):
        raise InputError(f"guided_channels: expected 1 to {noise.shape[1]}, got {guided_channels!r}")
    if guided_channels is not None and told_guidance(model):
        raise InputError("guided_channels: expected none for a model that is told the guidance, got some")
    for one in seed if isinstance(seed, Sequence) else [seed]:
        if not is_whole(one, -(2**63), 2**63 - 1):
            raise InputError(f"seed: expected a whole number of 64 bits, got {one!r}")
    if isinstance(seed, Sequence) and len(seed) != len(noise):
        raise InputError(f"seed: expected one, or one for each of {len(noise)} samples, got {len(seed)}")
    if guidance != 1.0 and y is None:
        raise InputError(f"guidance: expected 1.0 for a model without a condition, got {guidance}")
    need_interval(guidance_interval)
    need_number("shift", shift, above=0)
    if clip is not None:
        need_number("clip", clip, above=0)
    need_number("eta", eta)
    if not 0 <= eta <= 1 or (eta and sampler != "ddim"):
        raise InputError(f"eta: expected 0 to 1 for ddim and 0 for other samplers, got {eta} for {sampler}")
    if churn is not None and sampler not in ("euler", "heun"):
        raise InputError(f"churn: expected none for sampler {sampler}, got some")

    ask = _Guided(model, objective, y, len(noise), guidance, guidance_interval, guided_channels, clip)
    # Levels stay on the CPU: a device need not be waited for to know where a step stands.
    levels = objective.levels(steps, shift)
    draw = _Noise(noise, seed)
    was_training = model.training
    model.eval()
    try:
        z = noise.float() * levels[0]
        for i in range(steps):
            u, u_next = levels[i], levels[i + 1]
            if sampler in ("euler", "heun"):
                if churn is not None:
                    z, u = _churned(objective, churn, steps, z, u, draw)
                slope = ask(z, u).slope
                ahead = z + (u_next - u) * slope
                if sampler == "heun" and i + 1 < steps:
                    ahead = z + (u_next - u) * 0.5 * (slope + ask(ahead, u_next).slope)
                z = ahead
            else:
                z = _ancestral(objective, ask(z, u), z, u, u_next, eta if sampler == "ddim" else None, draw)
            if progress is not None:
                progress(i + 1, steps)
    finally:
        model.train(was_training)
    return z


def default_steps(objective: Objective) -> int:
    """25 steps, or as many as a shorter chain has."""
    return min(STEPS, objective.timesteps) if isinstance(objective, DDPM) else STEPS


def default_clip(objective: Objective, config: DiTConfig, data: RunData | None) -> float | None:
    """To what :func:`draw_samples` should clamp: 1 for a DDPM on pixels as they are, in [-1, 1]; else None.

    ``data``: what the model's run knows of its data; pixels that were scaled by mean and std reach beyond.
    """
    scaled = data is not None and (any(data.mean) or any(std != 1 for std in data.std))
    return 1.0 if isinstance(objective, DDPM) and config.latent_factor == 1 and not scaled else None


def told_guidance(model: nn.Module) -> bool:
    """Whether a model takes the guidance scale as an input."""
    return bool(getattr(getattr(model, "config", None), "guidance_embed", False))


def need_sampler(sampler: Any) -> None:
    """Raise InputError unless there is such a sampler."""
    need_choice("sampler", sampler, SAMPLERS)


def need_interval(interval: Any) -> None:
    """Raise InputError unless ``interval`` holds the least and the greatest share of noise at which to guide."""
    try:
        least, greatest = interval
        good = 0 <= least <= greatest <= 1
    except (TypeError, ValueError):
        good = False
    if not good:
        raise InputError(f"guidance_interval: expected 0 <= least <= greatest <= 1, got {interval!r}")


def guided_share(
    objective: Objective, *, steps: int, sampler: str, guidance_interval: tuple[float, float], shift: float = 1.0
) -> float:
    """The share of :func:`draw_samples`' evaluations that lie in the guidance interval; arguments as there."""
    levels = objective.levels(steps, shift)
    # Heun's method also asks where a step ends, but at the last.
    asked = [*levels[:-1], *(levels[1:-1] if sampler == "heun" else ())]
    return sum(_is_guided(objective, u, guidance_interval) for u in asked) / len(asked)


def _is_guided(objective: Objective, u: Tensor, interval: tuple[float, float]) -> bool:
    """Whether a level's share of noise, 0 for data and 1 for noise, lies in an interval, its ends among it."""
    # A level of float32 may lie beside an end that names it: 0.8 is 0.80000001 there.
    share = float(u / (objective.signal(u) + u))
    return interval[0] - _ROUNDING <= share <= interval[1] + _ROUNDING


class _Noise:
    """Standard normal tensors of one shape in a fixed order, the same on every device; of one seed, or of one for each sample."""

    def __init__(self, like: Tensor, seed: int | Sequence[int]) -> None:
        self.like, self.together = like, isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else seed
        # A caller may well have drawn the noise that sampling starts from with the same seed.
        self.generators = [torch.Generator().manual_seed(seed_for(one, "sampler")) for one in seeds]

    def __call__(self) -> Tensor:
        shape = self.like.shape if self.together else self.like.shape[1:]
        drawn = [torch.randn(shape, generator=generator) for generator in self.generators]
        return (drawn[0] if self.together else torch.stack(drawn)).to(self.like.device)


class _Told(nn.Module):
    """A model that takes float32 whatever its weights are, and is told the guidance where ``guidance`` is no None."""

    def __init__(self, model: nn.Module, guidance: float | None = None) -> None:
        super().__init__()
        self.model, self.guidance = model, guidance
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def forward(self, x: Tensor, t: Tensor, y: Any = None, *, drop: Tensor | None = None) -> Tensor:
        # The time stays as it is: bfloat16 has no 999.
        told = {} if self.guidance is None else {"guidance": t.new_full(t.shape, self.guidance)}
        out: Tensor = self.model(x.to(self.dtype), t, y, drop=drop, **told)
        return out


class _Guided:
    """The model with guidance, classifier-free or told, as a function of the place on the path."""

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        y: Any,
        count: int,
        guidance: float,
        interval: tuple[float, float],
        channels: int | None,
        clip: float | None,
    ) -> None:
        self.objective, self.y, self.count = objective, y, count
        self.guidance, self.interval, self.channels, self.clip = guidance, interval, channels, clip
        self.plain = self.guided = _Told(model)
        self.twice = None
        if told_guidance(model):
            self.guided = _Told(model, guidance)
        elif guidance != 1.0:
            self.twice = each(y, lambda part: torch.cat([part, part]))

    def __call__(self, z: Tensor, u: Tensor) -> Prediction:
        said = self._guided(z, u)
        if self.clip is None:
            return said
        # z - u slope is the clean image, on any linear path.
        clean = (z - u * said.slope).clamp(-self.clip, self.clip)
        return said._replace(slope=(z - clean) / u)

    def _guided(self, z: Tensor, u: Tensor) -> Prediction:
        count, objective = self.count, self.objective
        u_B = u.to(z.device).expand(count)
        if not _is_guided(objective, u, self.interval):
            return objective.predict(self.plain, z, u_B, self.y)
        if self.twice is None:
            return objective.predict(self.guided, z, u_B, self.y)
        drop = torch.arange(2 * count, device=z.device) >= count
        both = objective.predict(self.plain, torch.cat([z, z]), torch.cat([u_B, u_B]), self.twice, drop=drop)
        with_y, without = both.slope[:count], both.slope[count:]
        guided = torch.lerp(without, with_y, self.guidance)
        if self.channels is not None:
            guided = torch.cat([guided[:, : self.channels], with_y[:, self.channels :]], 1)
        return Prediction(guided, None if both.variance is None else both.variance[:count])


def _churned(
    objective: Objective, churn: Churn, steps: int, z: Tensor, u: Tensor, draw: _Noise
) -> tuple[Tensor, Tensor]:
    """z with noise added, and the level where it then is; as it was outside the churn's range."""
    signal = objective.signal(u)
    sigma = u / signal
    # Of pure noise, where rectified flow begins, no step can make more, however wide the range.
    if churn.amount == 0 or float(signal) == 0 or not churn.least <= float(sigma) <= churn.most:
        return z, u
    more = sigma * (1 + min(churn.amount / steps, math.sqrt(2) - 1))
    # Back to the linear path: signal and noise of x_0 + more eps, scaled as that path scales them.
    u_more = more if float(signal) == 1 and float(objective.signal(more)) == 1 else more / (1 + more)
    kept = objective.signal(u_more) / signal
    added = (u_more.square() - (kept * u).square()).clamp(min=0).sqrt()
    return kept * z + churn.noise * added * draw(), u_more


def _ancestral(
    objective: Objective, said: Prediction, z: Tensor, u: Tensor, u_next: Tensor, eta: float | None, draw: _Noise
) -> Tensor:
    """A step to u_next by way of the estimated data and noise: DDIM with ``eta``, or ancestral where that is None."""
    # z = a x_0 + u eps and slope = a' x_0 + eps with a = 1 + a' u, so both follow from z and the slope.
    falls = (objective.signal(u) - 1) / u
    clean = z - u * said.slope
    eps = said.slope - falls * clean
    low, high = objective.variance_bounds(u, u_next)
    if eta is not None:
        low = eta**2 * low
    mean = objective.signal(u_next) * clean + (u_next.square() - low).clamp(min=0).sqrt() * eps
    if float(u_next) == 0 or eta == 0:
        return mean
    if eta is None and said.variance is not None:
        return mean + torch.exp(0.5 * torch.lerp(low.log().to(z), high.log().to(z), said.variance)) * draw()
    return mean + low.sqrt() * draw()
