"""Quality laws such as FID(C): a power law that names its features and claims no less noise than seeds make."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.checks import need_least, need_whole
from ditscale.scaling.jsonable import load, plain
from ditscale.scaling.power import PowerFit, fit_power
from ditscale.scaling.results import Prediction
from ditscale.scaling.runs import RunTable, is_empty

# Repeats of one DiT recipe: B/4 68.4, 68.9 and 68.3 (seeds, under 1 %), XL/2 19.5 and 18.1 (JAX and PyTorch,
# 7 %); DiT's README, facebookresearch/DiT.
SEED_NOISE = 0.01
# Metrics that compare features of images, and what their values depend on beside the model (as ``ditscale evaluate``
# writes it into a run's record).
FEATURE_METRICS = ("frechet_distance", "fid", "precision", "recall")
SETTINGS = (
    "feature_network",
    "feature_network_sha256",
    "quality_samples",
    "reference_images",
    "reference_data",
    "decoder_sha256",
    "neighbours",
    "sampler",
    "sampler_steps",
    "guidance",
    "guidance_interval",
)
_FEW_SAMPLES = 10_000


class QualityFit:
    """A quality metric against compute.

    Attributes:
        power: the power law (with a floor where one was asked).
        metric, feature_network, samples: what was measured, on which features, with how many images.
        seed_noise: relative spread between seeds, the least noise of a new measurement.
        notes: what was done to the runs before.
    """

    notes: tuple[str, ...] = ()

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
            "notes": list(self.notes),
        }
        return plain(content)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> QualityFit:
        """Rebuild from :meth:`to_json`.

        Raises:
            InputError: the record is no saved quality law.
        """
        names = ("metric", "feature_network", "samples", "seed_noise", "floor_mode")
        if not set(names) <= set(record):
            raise InputError("quality: expected a fit saved by `ditscale fit power --y METRIC --json`, got none")
        return cls(PowerFit.from_json(record), *(record[name] for name in names[:4]))

    def summary(self) -> str:
        """A readable table."""
        samples = f", {self.samples} samples" if self.samples else ""
        lines = [f"{self.metric} on {self.feature_network} features{samples}", self.power.summary()]
        lines.append(
            f"  a new measurement is taken to scatter by {100 * self.seed_noise:g} % at least: seeds differ by that"
        )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

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
    need_least("seed-noise", seed_noise)
    if samples is not None:
        need_whole("samples", samples, 1)
    power = fit_power(flops, value, floor=floor, least_noise=float(seed_noise))
    if samples is not None and samples < _FEW_SAMPLES:
        power.warnings.append(
            f"{samples} samples: FID from few samples is biased upwards, and unequally between models"
        )
    return QualityFit(power, metric, feature_network, samples, float(seed_noise))


def fit_quality_of_runs(
    runs: RunTable,
    *,
    metric: str = "frechet_distance",
    x: str = "flops",
    feature_network: str | None = None,
    samples: int | None = None,
    floor: str | float = "none",
    seed_noise: float = SEED_NOISE,
    optimal: bool = False,
    pool: bool = False,
) -> QualityFit:
    """Fit a quality metric of finished runs, as ``ditscale evaluate --samples`` enters it into their records.

    Args:
        runs: with compute and the metric; runs without the metric are left out.
        metric: its column. Default: "frechet_distance".
        x: column of compute. Default: "flops".
        feature_network, samples: see :func:`fit_quality`. Default: the runs' own columns ``feature_network`` and
            ``quality_samples``.
        floor, seed_noise: see :func:`fit_quality`. A floor from outside may be ``frechet_distance_real``, what as many real
            images score.
        optimal: of each budget, only the run of least loss: the law along the compute-optimal path. The run is not chosen by
            its own metric, whose noise would then pass for quality. Default: False.
        pool: accept values of different samplers, numbers of samples or references. Default: False.

    Returns:
        QualityFit.

    Raises:
        InputError: no run has the metric; runs differ in how it was measured; no feature network is known.
    """
    if metric not in runs.columns:
        runs.column(metric)  # says which columns there are
    measured = np.array([isinstance(v, (int, float)) and v == v for v in runs.columns[metric].tolist()])
    if not measured.any():
        raise InputError(f"{metric}: expected a number in at least one run of {runs.source}, got none")
    best = set(runs.best_of_budgets().rows.tolist()) if optimal else set()
    if not measured.all():
        runs = runs.take(measured, f"kept {int(measured.sum())} of {len(runs)} runs: those with {metric}")
    if not pool:
        runs.check_poolable(SETTINGS)
    if optimal:
        runs = runs.best_of_budgets()
    network = feature_network or _only(runs, "feature_network") or ""
    count = _only(runs, "quality_samples") if samples is None else samples
    if feature_network and (found := _only(runs, "feature_network")) not in (None, feature_network):
        raise InputError(f"feature-network: expected {found!r}, as the runs say, got {feature_network!r}")
    fit = fit_quality(
        runs.column(x),
        runs.column(metric),
        feature_network=str(network),
        metric=metric,
        samples=None if count is None else int(count),
        floor=floor,
        seed_noise=seed_noise,
    )
    fit.notes = runs.notes
    others = len(set(runs.rows.tolist()) - best) if optimal else 0
    if others:
        fit.warnings.append(
            f"at {others} of {len(runs)} budgets the run of least loss has no {metric}, and another stands for it: the law is "
            "not that of the best runs"
        )
    return fit


def _only(runs: RunTable, name: str) -> Any:
    """The first value of a column that should have one, None where there is none."""
    values = runs.columns[name].tolist() if name in runs.columns else []
    return next((v for v in values if not is_empty(v)), None)


def saved_quality(source: QualityFit | str | Path) -> QualityFit:
    """A quality law, or the file of one.

    Raises:
        InputError: the file cannot be read or holds none.
    """
    if isinstance(source, QualityFit):
        return source
    record = load(source)
    return QualityFit.from_json(record if isinstance(record, Mapping) else {})
