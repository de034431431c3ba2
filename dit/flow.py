"""Rectified flow, and the fixed validation set on which every objective's loss is measured.

The path is ``x_t = (1 - t) x_0 + t eps`` with t from 0 (data) to 1 (noise); the model predicts the velocity
``v = eps - x_0`` (Liu et al., arXiv:2209.03003; training times logit-normal, Esser et al., arXiv:2403.03206).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditscale.dit.checks import need_choice, need_number
from ditscale.dit.condition import Condition, each
from ditscale.dit.objective import TIME_SCALE, Objective, Prediction, mean_per_sample, per_sample
from ditscale.errors import InputError

PREDICTIONS = ("velocity", "clean")
TIMES = ("logit-normal", "uniform")
NETWORKS = ("flow", "sit")
# Where the velocity follows from a predicted image, times below this divide by it instead.
_LEAST_TIME = 0.05
# Images whose validation noise is drawn at once; part of what the noise is.
_NOISE_PIECE = 64


class Noised(NamedTuple):
    """A point of the path and what the model should say there."""

    x_t: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class RectifiedFlow(Objective):
    """The objective, with times ``t = sigmoid(time_mean + time_std * normal)`` or uniform ones, shifted or not.

    Args:
        time_mean, time_std: of the logit-normal times. Default: 0 and 1.
        prediction: what the network's output stands for: the "velocity" itself, or the "clean" image, from which the
            velocity follows as ``(x_t - x_0) / max(t, 0.05)``. The loss is that of the velocity either way. Noise
            fills all dimensions of a patch and images do not, so a network that is narrow beside its patches can
            say the one and not the other (Li & He, arXiv:2511.13720). Default: "velocity".
        times: "logit-normal" or "uniform". Default: "logit-normal".
        network: how the network is spoken to: "flow" (it is told 1000 t and says ``eps - x_0``), or "sit", as the released
            SiT (Ma et al., arXiv:2401.08740: it is told ``1 - t`` and says ``x_0 - eps``). Default: "flow".
        shift: of training times, ``t' = shift t / (1 + (shift - 1) t)``: above 1 there is more noise, as larger images
            need (Esser et al., section 5.3.2). Default: 1.0.

    Raises:
        InputError: a value is not possible.
    """

    name: ClassVar[str] = "rectified-flow"

    time_mean: float = 0.0
    time_std: float = 1.0
    prediction: str = "velocity"
    times: str = "logit-normal"
    shift: float = 1.0
    network: str = "flow"

    def __post_init__(self) -> None:
        need_choice("prediction", self.prediction, PREDICTIONS)
        need_choice("times", self.times, TIMES)
        need_choice("network", self.network, NETWORKS)
        if self.network == "sit" and self.prediction != "velocity":
            raise InputError(f"prediction: expected velocity where network is sit, got {self.prediction!r}")
        need_number("time_mean", self.time_mean)
        need_number("time_std", self.time_std, above=0)
        need_number("shift", self.shift, above=0)

    @property
    def record_name(self) -> str:
        """The objective in run records."""
        return "rectified_flow_v"

    @property
    def loss_kind(self) -> str:
        """What the loss measures."""
        return "velocity_mse"

    def velocity(self, model: nn.Module, x_t: Tensor, t: Tensor, y: Any, *, drop: Tensor | None = None) -> Tensor:
        """The model's velocity at x_t [B, C, ...] and t [B]: [B, C, ...] float32."""
        if self.network == "sit":
            return -model(x_t, 1 - t, y, drop=drop)[:, : x_t.shape[1]].float()
        out = model(x_t, t * TIME_SCALE, y, drop=drop)[:, : x_t.shape[1]].float()
        if self.prediction == "velocity":
            return out
        return (x_t - out) / per_sample(t.clamp(min=_LEAST_TIME), x_t)

    def quantile(self, u: Tensor) -> Tensor:
        """Times below which a share u of all training times lies."""
        if self.times == "uniform":
            t = u.double()
        else:
            t = torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u.double()))
        return shifted(t, self.shift).float()

    def noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Noised:
        """The point at time t between x_0 and eps, [B, C, ...], and the velocity there."""
        return Noised(torch.lerp(x_0, eps, per_sample(t, x_0)), eps - x_0)

    def loss(self, model: nn.Module, x_0: Tensor, y: Any, eps: Tensor, t: Tensor, drop: Tensor | None = None) -> Tensor:
        """Mean squared error of the predicted velocity of each sample: [B] float32."""
        x_t, velocity = self.noise(x_0, eps, t)
        predicted = self.velocity(model, x_t, t, y, drop=drop)
        return mean_per_sample((predicted - velocity.float()).square())

    def signal(self, u: Tensor) -> Tensor:
        """The share of data: 1 - u."""
        return 1 - u

    def predict(self, model: nn.Module, z: Tensor, u: Tensor, y: Any, *, drop: Tensor | None = None) -> Prediction:
        """The path is linear as it is: z is x_t, u is t, and the slope is the velocity."""
        return Prediction(self.velocity(model, z, u, y, drop=drop))

    def levels(self, steps: int, shift: float = 1.0) -> Tensor:
        """Equal steps of time from 1 to 0, shifted."""
        return shifted(torch.linspace(1.0, 0.0, steps + 1), shift)


def shifted(t: Tensor, shift: float) -> Tensor:
    """``shift t / (1 + (shift - 1) t)``; as it is where the shift is 1."""
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class ValidationSet:
    """Images, conditions, noise and times that never change, so that losses differ by the model alone.

    Args:
        images: [n, C, ...] float32.
        conditions: as the model takes them, n rows, or None.
        times: [k] float32; every image is seen at every time, each with its own fixed noise.
        seed: of the noise.
    """

    images: Tensor
    conditions: Condition
    times: Tensor
    seed: int

    def batches(self, batch: int = 64) -> Iterator[tuple[int, Tensor, Condition, Tensor, Tensor]]:
        """For every time and piece of the set: the time's number, images, conditions, noise and times of each image."""
        generator = torch.Generator().manual_seed(self.seed)
        for i, time in enumerate(self.times):
            # In pieces of one size, whatever the batch: what a generator gives depends on how much it is asked for at once.
            noise = torch.cat([torch.randn(x.shape, generator=generator) for x in self.images.split(_NOISE_PIECE)])
            for start in range(0, len(self.images), batch):
                rows = slice(start, start + batch)
                x_0, y = self.images[rows], each(self.conditions, operator.itemgetter(rows))
                yield i, x_0, y, noise[rows], time.expand(len(x_0))

    @torch.no_grad()
    def loss(self, model: nn.Module, objective: Objective, *, batch: int = 64) -> list[float]:
        """The mean loss at every time, k floats, on the model's device; summed in float64 in a fixed order."""
        device = next((p.device for p in model.parameters()), self.images.device)
        was_training = model.training
        model.eval()
        totals = [0.0] * len(self.times)
        for i, x_0, y, eps, t in self.batches(batch):
            x_0, eps, t = (tensor.to(device) for tensor in (x_0, eps, t))
            y = each(y, lambda tensor: tensor.to(device))
            totals[i] += float(objective.loss(model, x_0, y, eps, t).double().sum())
        model.train(was_training)
        return [total / len(self.images) for total in totals]
