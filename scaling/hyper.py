"""Reading hyper-parameter laws for a plan: a published one, a fit, or the file of a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.hparams import HparamsFit, Optimum
from ditscale.scaling.jsonable import load
from ditscale.scaling.registry import PUBLISHED, Power, published

# (params, tokens, images, flops) -> value.
Hyper = Callable[[float, float, float, float], float]


@dataclass(frozen=True)
class HyperLaw:
    """Batch (in tokens) and learning rate for a plan, each None where the law does not speak of it.

    Attributes:
        batch_tokens, lr: (params, tokens, images, flops) -> value.
        intervals: name -> (params, tokens, images, flops) -> 95 % interval, where the law comes with one.
    """

    batch_tokens: Hyper | None
    lr: Hyper | None
    intervals: Mapping[str, Callable[[float, float, float, float], list[float]]] = field(default_factory=dict)


def hyper_law(spec: Any) -> HyperLaw:
    """Read hyper-parameter laws: a published name, a HparamsFit, or the file of one (``fit hparams --json``).

    Raises:
        InputError: none of these.
    """
    if isinstance(spec, HparamsFit):
        return _fitted(spec.optima, spec.data_unit)
    if str(spec) in PUBLISHED:
        law = published(str(spec))
        powers = {k: law.laws[k] for k in ("lr", "batch_tokens") if k in law.laws}
        if not powers:
            holds = ", ".join(law.laws) or "a surface alone"
            raise InputError(f"hparams: expected a law of batch or learning rate, got {law.name}, which holds {holds}")
        of = {k: of_tokens(v) for k, v in powers.items()}
        return HyperLaw(of.get("batch_tokens"), of.get("lr"))
    path = Path(str(spec))
    if not path.is_file():
        raise InputError(
            f"hparams: expected a published law or a file of `ditscale fit hparams --json`, got {str(spec)!r}"
        )
    record = load(path)
    if not isinstance(record, Mapping) or record.get("kind") != "hparams":
        raise InputError(f"hparams: expected {path} to hold `ditscale fit hparams --json`, got something else")
    try:
        optima = {
            k: Optimum(
                Power(v["coefficient"], v["exponents"], v["unit"], 17),
                np.array(v["covariance"], dtype=float),
                float(v["spread"]),
                int(v["dof"]),
            )
            for k, v in record["laws"].items()
        }
        return _fitted(optima, record["data_unit"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"hparams: expected {path} to hold `ditscale fit hparams --json`, got no {error}") from None


def of_tokens(law: Power) -> Hyper:
    """A published law, asked as a plan asks."""
    return lambda n, tokens, images, flops: float(law(params=n, tokens=tokens, flops=flops))


@dataclass(frozen=True)
class _Fitted:
    """A fitted optimum asked as a plan asks: in its own unit of data, with batches turned into tokens."""

    optimum: Optimum
    unit: str
    batch: bool

    def _at(self, params: float, tokens: float, images: float) -> tuple[float, list[float]]:
        got = self.optimum.at(params=params, data=tokens if self.unit == "tokens" else images)
        scale = tokens / images if self.batch else 1.0
        return got["value"] * scale, [end * scale for end in got["interval"]]

    def value(self, params: float, tokens: float, images: float, flops: float) -> float:
        return self._at(params, tokens, images)[0]

    def interval(self, params: float, tokens: float, images: float, flops: float) -> list[float]:
        return self._at(params, tokens, images)[1]


def _fitted(optima: Mapping[str, Optimum], unit: str) -> HyperLaw:
    known = {
        "batch_tokens" if name == "batch" else name: _Fitted(optimum, unit, name == "batch")
        for name, optimum in optima.items()
    }
    values = {name: fitted.value for name, fitted in known.items()}
    intervals = {name: fitted.interval for name, fitted in known.items()}
    return HyperLaw(values.get("batch_tokens"), values.get("lr"), intervals)
