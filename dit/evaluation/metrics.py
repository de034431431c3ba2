"""Distances between two sets of features, float64: Fréchet distance, precision and recall. numpy and scipy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ditscale.errors import InputError

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        count: samples.
        mean: [d].
        covariance: [d, d], unbiased (divided by count - 1).
    """

    count: int
    mean: Features
    covariance: Features

    @classmethod
    def of(cls, features: Features) -> Moments:
        """Of features [n, d], n >= 2."""
        if features.ndim != 2 or len(features) < 2:
            raise InputError(f"features: expected [n, d] with n >= 2, got shape {list(features.shape)}")
        if not np.isfinite(features).all():
            raise InputError("features: expected finite values, got NaN or infinity")
        x = features.astype(np.float64)
        return cls(len(x), x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Squared Fréchet distance of two normal distributions: ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))``.

    FID where the features are Inception's (Heusel et al., arXiv:1706.08500). The root's trace is that of
    ``(C_a^(1/2) C_b C_a^(1/2))^(1/2)``, which is symmetric, so that covariances of few samples, which have no full rank,
    need no correction; numbers that rounding made negative count as 0. Never below 0.

    Raises:
        InputError: different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features: expected the same number in both, got {len(a.mean)} and {len(b.mean)}")
    values, vectors = scipy.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ b.covariance @ root
    spectrum = np.clip(scipy.linalg.eigvalsh((inner + inner.T) / 2), 0, None)
    gap = a.mean - b.mean
    distance = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(spectrum).sum()
    return max(float(distance), 0.0)


def precision_recall(real: Features, drawn: Features, *, neighbours: int = 3) -> tuple[float, float]:
    """Precision and recall of drawn samples (Kynkäänniemi et al., arXiv:1904.06991).

    A set's region is the union of balls around its samples, each as wide as the distance to its k-th nearest neighbour.
    Precision is the share of drawn samples within the real region, recall that of real samples within the drawn one. Both
    depend on the numbers of samples, so compare them at equal numbers only.

    Args:
        real, drawn: features [n, d] and [m, d].
        neighbours: k. Default: 3.

    Raises:
        InputError: too few samples for k.
    """
    least = min(len(real), len(drawn))
    if not 1 <= neighbours < least:
        raise InputError(f"neighbours: expected 1 to {least - 1} for {least} samples, got {neighbours}")
    return _covered(drawn, real, neighbours), _covered(real, drawn, neighbours)


def _covered(points: Features, by: Features, neighbours: int, *, rows: int = 1024) -> float:
    """Share of ``points`` within the region of ``by``."""
    radius = np.concatenate(
        [
            np.partition(_distances(by[i : i + rows], by), neighbours, axis=1)[:, neighbours]
            for i in range(0, len(by), rows)
        ]
    )
    hits = sum(int((_distances(points[i : i + rows], by) <= radius).any(1).sum()) for i in range(0, len(points), rows))
    return hits / len(points)


def _distances(a: Features, b: Features) -> Features:
    """Squared distances [n, m]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    squares: Features = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)
    return np.maximum(squares, 0)
