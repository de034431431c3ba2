"""Quality laws such as FID(C): a power law that names its features and claims no less noise than seeds make."""

from __future__ import annotations

from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.jsonable import plain
from ditscale.scaling.power import PowerFit, fit_power
from ditscale.scaling.results import Prediction

# Repeats of one DiT recipe: B/4 68.4, 68.9 and 68.3 (seeds, under 1 %), XL/2 19.5 and 18.1 (JAX and PyTorch,
# 7 %); DiT's README, facebookresearch/DiT.
SEED_NOISE = 0.01
PORT_NOISE = 0.07


class QualityFit:
    """A quality metric against compute.

    Attributes:
        power: the power law (with a floor where one was asked).
        metric, feature_network, samples: what was measured, on which features, with how many images.
        seed_noise: relative spread between seeds, the least noise of a new measurement.
    """

    def __init__(
        self, power: PowerFit, metric: str, feature_network: str, samples: int | None, seed_noise: float
    ) -> None:
        self.power = power
        self.metric = metric
        self.feature_network = feature_network
        self.samples = samples
        self.seed_noise = seed_noise

    @property
    def params(self) -> dict[str, float]:
        """coefficient, exponent, floor."""
        return self.power.params

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals by name."""
        return self.power.intervals

    @property
    def converged(self) -> bool:
        """Whether the certificate of the fit holds."""
        return self.power.converged

    @property
    def warnings(self) -> list[str]:
        """What a reader must know."""
        return self.power.warnings

    def predict(self, flops: Any, *, level: float = 0.95) -> Prediction:
        """Predict the metric; a new measurement's interval is at least as wide as the seed noise makes it."""
        return self.power.predict(flops, level=level)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = {
            **self.power.to_json(),
            "metric": self.metric,
            "feature_network": self.feature_network,
            "samples": self.samples,
            "seed_noise": self.seed_noise,
        }
        return plain(content)

    def summary(self) -> str:
        """A readable table."""
        samples = f", {self.samples} samples" if self.samples else ""
        return f"{self.metric} on {self.feature_network} features{samples}\n{self.power.summary()}"

    def __str__(self) -> str:
        return self.summary()


def fit_quality(
    flops: Any,
    value: Any,
    *,
    feature_network: str,
    metric: str = "fid",
    samples: int | None = None,
    floor: str | float = "none",
    seed_noise: float = SEED_NOISE,
) -> QualityFit:
    """Fit a quality metric against compute.

    Args:
        flops, value: positive [n].
        feature_network: whose features the metric compares, such as "inception-v3" or "clip-vit-l/14": values
            on different features are different metrics.
        metric: its name. Default: "fid".
        samples: generated images per value; a smaller number biases FID upwards.
        floor: see :func:`ditscale.scaling.power.fit_power`.
        seed_noise: relative spread between seeds of one recipe. Default: 0.01.

    Returns:
        QualityFit.

    Raises:
        InputError: no feature network, or what :func:`fit_power` refuses.
    """
    if not feature_network:
        raise InputError("feature-network: expected the network whose features the metric compares, got none")
    if not (np.isfinite(seed_noise) and seed_noise >= 0):
        raise InputError(f"seed-noise: expected a number of at least 0, got {seed_noise!r}")
    power = fit_power(flops, value, floor=floor)
    power.fit.assume_noise(seed_noise)
    if samples is not None and samples < 10_000:
        power.warnings.append(
            f"{samples} samples: FID from few samples is biased upwards, and unequally between models"
        )
    return QualityFit(power, metric, feature_network, samples, float(seed_noise))
