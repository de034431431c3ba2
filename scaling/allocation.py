"""One face for every law that can spend a budget: published, a fitted surface, isoFLOP lines, or a file of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.hyper import Hyper, of_tokens
from ditscale.scaling.isoflop import IsoflopFit, of_one_run
from ditscale.scaling.jsonable import load
from ditscale.scaling.power import PowerFit
from ditscale.scaling.registry import PublishedLaw, published
from ditscale.scaling.surface import SurfaceFit


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, None where the law comes without one."""

    value: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Allocation:
    """What a law says about budgets.

    Attributes:
        name, source: of the law.
        data_unit: "images" or "tokens".
        optimum: compute -> estimates by name: "params", and "data", "loss" (interval of a new run), "fid",
            ... where known.
        loss_at: (params, data) -> loss, or None for laws of compute alone.
        cost: (params, data) -> FLOPs, or None.
        data_for: (params, flops) -> data, or None.
        batch_tokens, lr: (params, tokens, images, flops) -> value, or None.
        flop_convention, params_kind: what C and N count.
        budget_range: of the runs behind the law, or None.
        notes: what a user of the law must know.
        surface: the fit behind it, where there is one.
        allocates: whether "params" are parameters (some laws count FLOPs per token).
        counts: which parameters of a DiT N means: "per_token" or "total".
    """

    name: str
    source: str
    data_unit: str
    optimum: Callable[[float], dict[str, Estimate]]
    loss_at: Callable[[Any, Any], Any] | None
    cost: Callable[[Any, Any], Any] | None
    data_for: Callable[[Any, Any], Any] | None
    flop_convention: str
    params_kind: str
    budget_range: tuple[float, float] | None
    batch_tokens: Hyper | None = None
    lr: Hyper | None = None
    notes: tuple[str, ...] = ()
    surface: SurfaceFit | None = None
    allocates: bool = True
    counts: str = "per_token"


def allocation(law: Any) -> Allocation:
    """Read a law: a published name, a fit, a saved fit's file (``fit surface|isoflop --json``), or a study's
    folder.

    Raises:
        InputError: none of these, or a law that allocates nothing.
    """
    if isinstance(law, Allocation):
        return law
    if isinstance(law, PublishedLaw):
        return _published(law)
    if isinstance(law, SurfaceFit):
        return _surface(law)
    if isinstance(law, IsoflopFit):
        return _isoflop(law.to_json())
    path = Path(str(law))
    if path.is_dir():
        path = path / "laws.json"
        if not path.is_file():
            raise InputError(f"law: expected a study folder with laws.json, got {str(law)!r}")
    if path.is_file():
        return from_record(load(path), str(path))
    return _published(published(str(law)))


def from_record(record: Any, source: str) -> Allocation:
    """Read the JSON of a surface fit, an isoFLOP fit, or a study's laws.json that holds both."""
    if isinstance(record, Mapping):
        if "saved" in record and "cost" in record:
            return _surface(SurfaceFit.from_json(record))
        if "optima" in record and "N_opt" in record:
            return _isoflop(record)
        for key in ("surface", "isoflop"):
            if isinstance(record.get(key), Mapping):
                try:
                    return from_record(record[key], source)
                except InputError:
                    continue
    raise InputError(f"law: expected {source} to hold a fit saved by `ditscale fit surface|isoflop --json`, got none")


def _published(law: PublishedLaw) -> Allocation:
    surface = law.surface
    if not law.optimum(1e20).get("params"):
        raise InputError(f"law: {law.name} allocates no budget ({law.title}); it holds {', '.join(law.laws)}")

    def optimum(flops: float) -> dict[str, Estimate]:
        best = {k: Estimate(v) for k, v in law.optimum(flops).items()}
        if "tokens" in best:
            best["data"] = best.pop("tokens")
        return best

    simple = law.flop_convention == "6ND"
    hyper = {name: of_tokens(law.laws[name]) for name in ("batch_tokens", "lr") if name in law.laws}
    return Allocation(
        name=law.name,
        source=law.source,
        data_unit="tokens",
        optimum=optimum,
        loss_at=surface.loss if surface else None,
        cost=(lambda n, d: 6.0 * n * d) if simple else None,
        data_for=(lambda n, c: c / (6.0 * n)) if simple else None,
        flop_convention=law.flop_convention,
        params_kind=law.params_kind,
        budget_range=law.budget_range,
        batch_tokens=hyper.get("batch_tokens"),
        lr=hyper.get("lr"),
        notes=law.notes,
        allocates="FLOPs per token" not in law.params_kind,
    )


def _surface(fit: SurfaceFit) -> Allocation:
    if not fit.converged:
        raise InputError("law: expected a converged fit, got one that is not; fit it with more starts")
    if fit.cost is None:
        raise InputError("law: expected a surface fitted with --flops (measured compute), got one without")
    cost = fit.cost

    def optimum(flops: float) -> dict[str, Estimate]:
        best = fit.optimum(flops)
        return {
            "params": Estimate(best["params"].value, (best["params"].low, best["params"].high)),
            "data": Estimate(best["data"].value, (best["data"].low, best["data"].high)),
            "loss": Estimate(best["loss"].value, (best["new_run"].low, best["new_run"].high)),
        }

    return Allocation(
        name=fit.fit.law.name,
        source=fit.source,
        data_unit=fit.data_unit,
        optimum=optimum,
        loss_at=lambda n, d: fit.fit.law.predict(fit.fit.params, params=n, data=d),
        cost=cost.flops,
        data_for=lambda n, c: cost.data(c, n),
        flop_convention=cost.source,
        params_kind=f"column {fit.size} of the runs",
        budget_range=fit.flops_range,
        counts=_counts(fit.size),
        surface=fit,
        notes=tuple(fit.warnings),
    )


def _counts(size: str) -> str:
    """Which parameters a column of sizes means: all of them unless its name says otherwise."""
    return "per_token" if "per_token" in size else "total"


def _isoflop(record: Mapping[str, Any]) -> Allocation:
    try:
        laws = {
            k: PowerFit.from_json(record[key]) for k, key in (("params", "N_opt"), ("data", "D_opt"), ("loss", "loss"))
        }
        budgets = [float(v["budget"]) for v in record["optima"]]
        unit, source = record["data_unit"], record["source_file"]
        noise = float(record.get("run_noise", 0.0))  # files of earlier versions have none
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"law: expected a saved isoFLOP fit, got a record without {error}") from None

    def optimum(flops: float) -> dict[str, Estimate]:
        out = {}
        for name, law in laws.items():
            p = law.predict(flops)
            low, high = of_one_run(law, p, noise) if name == "loss" else p.interval
            known = np.isfinite(low) and np.isfinite(high)
            out[name] = Estimate(float(p.value), (float(low), float(high)) if known else None)
        return out

    return Allocation(
        name=f"isoflop-{record.get('vertex', 'parabola')}",
        source=source,
        data_unit=unit,
        optimum=optimum,
        loss_at=None,
        cost=None,
        data_for=None,
        flop_convention="measured",
        params_kind=f"column {record.get('size', 'params')} of the runs",
        budget_range=(min(budgets), max(budgets)),
        counts=_counts(str(record.get("size", "params"))),
        notes=tuple(record.get("warnings", ())),
    )
