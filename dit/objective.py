"""What every training objective is to the trainer and to the samplers.

Noise meets data along a path ``x_t = signal(t) x_0 + level(t) eps``. The trainer asks for times, a loss and validation
times. The samplers walk the *linear* form of the path, ``z = a(u) x_0 + u eps`` with ``a(u) = 1 - u`` (rectified flow)
or 1 (diffusion, after division by the signal), in which a step along the slope ``dz/du`` is exact where the model's
estimate does not change.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig

# The model's sines and cosines were made for times from 0 to 1000.
TIME_SCALE = 1000.0


class Prediction(NamedTuple):
    """What a model says at a point of the linear path.

    Attributes:
        slope: dz/du [B, ...] float32.
        variance: where the model learned it, the place of the log-variance between its bounds, 0 to 1, [B, ...];
            else None.
    """

    slope: Tensor
    variance: Tensor | None = None


class Objective(abc.ABC):
    """A path from data to noise, a distribution of times, and a loss; subclasses are frozen dataclasses.

    Attributes:
        name: in configurations.
    """

    name: ClassVar[str]

    @property
    @abc.abstractmethod
    def record_name(self) -> str:
        """The objective in run records."""

    @property
    @abc.abstractmethod
    def loss_kind(self) -> str:
        """What :meth:`loss` measures, in run records."""

    @abc.abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Training times below which a share u, [n] in (0, 1), of all training times lies: [n] float32."""

    @abc.abstractmethod
    def loss(self, model: nn.Module, x_0: Tensor, y: Any, eps: Tensor, t: Tensor, drop: Tensor | None = None) -> Tensor:
        """The training loss of each sample, [B] float32.

        Args:
            model: called as ``model(x, time, y, drop=drop)``.
            x_0: data [B, C, ...].
            y: condition as the model takes it, or None.
            eps: standard normal noise, as x_0.
            t: [B] times as :meth:`sample_times` gives them.
            drop: [B] bool, samples that see no condition. Default: None.
        """

    @abc.abstractmethod
    def signal(self, u: Tensor) -> Tensor:
        """The share a(u) of data on the linear path."""

    @abc.abstractmethod
    def predict(self, model: nn.Module, z: Tensor, u: Tensor, y: Any, *, drop: Tensor | None = None) -> Prediction:
        """The model's slope at z [B, C, ...] and u [B] of the linear path."""

    @abc.abstractmethod
    def levels(self, steps: int, shift: float = 1.0) -> Tensor:
        """Where a sampler of ``steps`` steps stops on the linear path, from noise to 0: [steps + 1].

        ``shift`` above 1 spends more of the steps at high noise.
        """

    def variance_bounds(self, u: Tensor, u_next: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest variance that an ancestral step from u to u_next can add, on the linear path.

        The least is that of the posterior where the data are a point, the greatest that of the path itself. Written for
        any path: with ``r = a(u) / a(u_next)`` the path adds ``u^2 - r^2 u_next^2``.
        """
        r = self.signal(u) / self.signal(u_next)
        added = u.square() - (r * u_next).square()
        return added * (u_next / u).square(), added

    def check_model(self, config: DiTConfig) -> None:  # noqa: B027 - most objectives train any model
        """Raise InputError where a model of this configuration cannot be trained so."""

    def sample_times(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` training times, stratified over the batch: [count] float32.

        One time falls into each of ``count`` equally likely bins, which leaves the distribution of every single time
        as it is and takes most of the times' share out of the noise of the batch loss.
        """
        u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        return self.quantile(u[torch.randperm(count, generator=generator)].clamp(1e-6, 1 - 1e-6))

    def validation_times(self, count: int) -> Tensor:
        """The middles of ``count`` equally likely bins of the training distribution: [count] float32."""
        return self.quantile((torch.arange(count) + 0.5) / count)

    def to_dict(self) -> dict[str, Any]:
        """Name and fields as plain values; :func:`objective_from_dict` is the inverse."""
        return {"name": self.name} | dataclasses.asdict(self)  # type: ignore[call-overload]


def objective_from_dict(values: Mapping[str, Any]) -> Objective:
    """An objective from its name ("rectified-flow" where none is given) and its fields.

    Raises:
        InputError: no such objective, no such field, or a value that is not possible.
    """
    from ditscale.dit.diffusion import DDPM, EDM
    from ditscale.dit.flow import RectifiedFlow

    known: dict[str, type[Objective]] = {kind.name: kind for kind in (RectifiedFlow, DDPM, EDM)}
    fields = dict(values)
    name = fields.pop("name", RectifiedFlow.name)
    if not isinstance(name, str) or name not in known:
        raise InputError(f"objective.name: expected one of {', '.join(known)}, got {name!r}")
    possible = {field.name for field in dataclasses.fields(known[name])}  # type: ignore[arg-type]
    unknown = sorted(set(fields) - possible)
    if unknown:
        raise InputError(f"objective.{unknown[0]}: no such field of {name} (fields: {', '.join(sorted(possible))})")
    return known[name](**fields)


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, ...] of the rank and dtype of ``like``."""
    return t.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def mean_per_sample(x: Tensor) -> Tensor:
    """[B, ...] to [B]."""
    return x.mean(dim=tuple(range(1, x.ndim)))
