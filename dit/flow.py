"""Rectified flow: its training loss, its fixed validation loss and its samplers.

The path is ``x_t = (1 - t) x_0 + t eps`` with t from 0 (data) to 1 (noise); the model predicts the velocity
``v = eps - x_0`` (Liu et al., arXiv:2209.03003; training times logit-normal, Esser et al., arXiv:2403.03206).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ditscale.errors import InputError

# The model's sines and cosines were made for times from 0 to 1000.
TIME_SCALE = 1000.0
PREDICTIONS = ("velocity", "clean")
# Where the velocity follows from a predicted image, times below this divide by it instead.
_LEAST_TIME = 0.05
SAMPLERS = ("euler", "heun")


class Noised(NamedTuple):
    """A point of the path and what the model should say there."""

    x_t: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class RectifiedFlow:
    """The objective, with times ``t = sigmoid(time_mean + time_std * normal)``.

    Args:
        time_mean, time_std: of the logit-normal times. Default: 0 and 1.
        prediction: what the network's output stands for: the "velocity" itself, or the "clean" image, from which the
            velocity follows as ``(x_t - x_0) / max(t, 0.05)``. The loss is that of the velocity either way. Noise
            fills all dimensions of a patch and images do not, so a network that is narrow beside its patches can
            say the one and not the other (Li & He, arXiv:2511.13720). Default: "velocity".

    Raises:
        InputError: an unknown prediction.
    """

    time_mean: float = 0.0
    time_std: float = 1.0
    prediction: str = "velocity"

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")

    def velocity(
        self, model: nn.Module, x_t: Tensor, t: Tensor, y: Tensor | None, *, drop: Tensor | None = None
    ) -> Tensor:
        """The model's velocity at x_t [B, C, S, S] and t [B]: [B, C, S, S] float32."""
        out = model(x_t, t * TIME_SCALE, y, drop=drop)[:, : x_t.shape[1]].float()
        if self.prediction == "velocity":
            return out
        return (x_t - out) / t.clamp(min=_LEAST_TIME).view(-1, 1, 1, 1)

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` logit-normal times, stratified over the batch: [count] float32 in (0, 1).

        One time falls into each of ``count`` equally likely bins, which leaves every single time logit-normal and
        takes most of the times' share out of the noise of the batch loss.
        """
        u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        u = u[torch.randperm(count, generator=generator)].clamp(1e-6, 1 - 1e-6)
        return self._quantile(u)

    def validation_times(self, count: int) -> Tensor:
        """The middles of ``count`` equally likely bins of the training distribution: [count] float32."""
        return self._quantile((torch.arange(count) + 0.5) / count)

    def _quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u.double())).float()

    def noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Noised:
        """The point at time t between x_0 and eps, [B, C, S, S], and the velocity there."""
        t_B111 = t.view(-1, 1, 1, 1)
        return Noised(torch.lerp(x_0, eps, t_B111), eps - x_0)

    def loss(
        self, model: nn.Module, x_0: Tensor, y: Tensor | None, eps: Tensor, t: Tensor, drop: Tensor | None = None
    ) -> Tensor:
        """Mean squared error of the predicted velocity of each sample: [B] float32."""
        x_t, velocity = self.noise(x_0, eps, t)
        predicted = self.velocity(model, x_t, t, y, drop=drop)
        return (predicted - velocity.float()).square().mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class ValidationSet:
    """Images, conditions, noise and times that never change, so that losses differ by the model alone.

    Args:
        images: [n, C, S, S] float32.
        conditions: [n] or [n, K] int64, or None.
        times: [k] float32; every image is seen at every time, each with its own fixed noise.
        seed: of the noise.
    """

    images: Tensor
    conditions: Tensor | None
    times: Tensor
    seed: int

    @torch.no_grad()
    def loss(self, model: nn.Module, flow: RectifiedFlow, *, batch: int = 64) -> list[float]:
        """The mean loss at every time, k floats; summed in float64 in a fixed order."""
        was_training = model.training
        model.eval()
        generator = torch.Generator().manual_seed(self.seed)
        means = []
        for time in self.times:
            total = 0.0
            for start in range(0, len(self.images), batch):
                x_0 = self.images[start : start + batch]
                y = None if self.conditions is None else self.conditions[start : start + batch]
                eps = torch.randn(x_0.shape, generator=generator)
                total += float(flow.loss(model, x_0, y, eps, time.expand(len(x_0))).double().sum())
            means.append(total / len(self.images))
        model.train(was_training)
        return means


@torch.no_grad()
def draw_samples(
    model: nn.Module,
    noise: Tensor,
    y: Tensor | None = None,
    *,
    flow: RectifiedFlow | None = None,
    steps: int = 25,
    sampler: str = "heun",
    guidance: float = 1.0,
    shift: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Follow the flow from noise to images.

    Args:
        model: called as ``model(x, t, y, drop=...)``; its first C channels are the prediction.
        noise: [B, C, S, S] standard normal.
        y: the condition as the model takes it, or None.
        flow: the objective that the model was trained with. Default: ``RectifiedFlow()``.
        steps: intervals of time, at least 1. Default: 25.
        sampler: "euler" (one evaluation a step) or "heun" (two; the last step one). Default: "heun".
        guidance: classifier-free guidance weight w in ``v_none + w (v_y - v_none)``; 1 means none and costs half.
            Default: 1.0.
        shift: > 1 spends more steps at high noise, ``t' = shift t / (1 + (shift - 1) t)``. Default: 1.0.
        progress: called with (steps done, steps). Default: None.

    Returns:
        [B, C, S, S] float32, not clipped.

    Raises:
        InputError: an argument is out of range, or guidance is asked for without a condition.
    """
    if steps < 1:
        raise InputError(f"steps: expected at least 1, got {steps}")
    if sampler not in SAMPLERS:
        raise InputError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
    if guidance != 1.0 and y is None:
        raise InputError(f"guidance: expected 1.0 for a model without a condition, got {guidance}")
    if not shift > 0:
        raise InputError(f"shift: expected a positive number, got {shift}")

    flow = flow or RectifiedFlow()
    was_training = model.training
    model.eval()
    x = noise.float()
    count = len(noise)
    drop = torch.arange(2 * count, device=noise.device) >= count

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t_B = t.to(noise.device).expand(count)
        if guidance == 1.0:
            return flow.velocity(model, x, t_B, y)
        both = flow.velocity(model, torch.cat([x, x]), torch.cat([t_B, t_B]), torch.cat([y, y]), drop=drop)
        return torch.lerp(both[count:], both[:count], guidance)

    times = torch.linspace(1.0, 0.0, steps + 1)
    times = shift * times / (1 + (shift - 1) * times)
    for i in range(steps):
        t, t_next = times[i], times[i + 1]
        v = velocity(x, t)
        ahead = x + (t_next - t) * v
        if sampler == "heun" and i + 1 < steps:
            ahead = x + (t_next - t) * 0.5 * (v + velocity(ahead, t_next))
        x = ahead
        if progress is not None:
            progress(i + 1, steps)
    model.train(was_training)
    return x
