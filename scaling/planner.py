"""Plans: from a budget, a target loss or a deadline to what to train, for how long, and how good it will
be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize

from ditscale.errors import InputError
from ditscale.scaling.allocation import Allocation, Estimate, allocation
from ditscale.scaling.gpus import ASSUMED_MFU, peak_flops
from ditscale.scaling.jsonable import plain

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig

_FLATNESS = 0.01
_FAR = 1e4


@dataclass
class Plan:
    """What to train with a budget.

    Attributes:
        budget: training compute in FLOPs.
        params, data: the compute-optimal run, D in ``data_unit``.
        loss: its predicted loss, None where the law has none.
        intervals: 95 % intervals by name (that of the loss is for one new run), None where the law comes
            without.
        fid: predicted quality, None where the law has none.
        tokens, images: D in both units where the number of tokens of an image is known.
        configuration: an integer DiT near the optimum, trained on the whole budget (see
            ``configurations.py``), or None.
        lr: peak learning rate, None without a hyper-parameter law.
        hours: wall time, and ``gpu_hours``, ``gpus``, ``gpu``, ``mfu``, ``mfu_source``; None without a
            machine.
        flatness: how much smaller or larger a model costs 1 % more loss at the same compute, None without a
            surface.
        inference: the run of least training plus inference compute at the same loss, None if not asked.
        wrong: what it costs if N_opt stands at either end of its interval, None without a surface.
        extrapolation: budget over the largest fitted compute, None where that is not known.
        law, source, flop_convention: where the answer comes from.
        warnings: what a reader must know.
    """

    budget: float
    params: float
    data: float | None
    data_unit: str
    loss: float | None
    fid: float | None
    intervals: dict[str, Any]
    law: str
    source: str
    flop_convention: str
    extrapolation: float | None
    tokens: float | None = None
    images: float | None = None
    quality: dict[str, float] = field(default_factory=dict)
    configuration: dict[str, Any] | None = None
    batch_tokens: float | None = None
    lr: float | None = None
    machine: dict[str, Any] | None = None
    flatness: dict[str, float] | None = None
    inference: dict[str, float] | None = None
    wrong: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The contract's keys of ``ditscale plan --json`` and the rest."""
        return plain(self.__dict__)

    def summary(self) -> str:
        """A readable answer."""
        ends = self.intervals

        def line(name: str, value: float | None, key: str, unit: str = "") -> str | None:
            if value is None:
                return None
            interval = ends.get(key)
            tail = f"   95 % [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
            return f"  {name:14s}{value:12.5g} {unit}{tail}"

        lines: list[str | None] = [f"plan for {self.budget:.4g} training FLOPs by {self.law} ({self.source})"]
        lines += [
            line("parameters", self.params, "params"),
            line("data", self.data, "data", self.data_unit),
            line("loss", self.loss, "loss"),
            line("FID", self.fid, "fid"),
            line("learning rate", self.lr, "lr"),
        ]
        if self.extrapolation is not None:
            lines.append(f"  {self.extrapolation:.3g}x the largest compute behind the law")
        if self.configuration:
            c = self.configuration
            lines.append(
                f"  DiT: depth {c['depth']}, width {c['width']}, heads {c['heads']}, patch {c['patch']} at "
                f"{c['image_size']} px: "
                f"{c['params'] / 1e6:.4g} M parameters ({c['params_per_token'] / 1e6:.4g} M per token), "
                f"{c['images']:.4g} images" + (f", {c['steps']} steps of {c['batch']}" if c["steps"] else "")
            )
        if self.machine:
            m = self.machine
            lines.append(
                f"  {m['gpu_hours']:.4g} GPU-hours, {m['hours']:.4g} h on {m['gpus']} x {m['gpu']} at MFU "
                f"{m['mfu']:.2f} "
                f"({m['mfu_source']})"
            )
        if self.flatness:
            lines.append(
                f"  flat: {self.flatness['smaller']:.3g}x to {self.flatness['larger']:.3g}x of N costs at "
                f"most 1 % more loss"
            )
        if self.inference:
            i = self.inference
            lines.append(
                f"  with inference: N {i['params']:.4g}, D {i['data']:.4g} at the same loss, total compute "
                f"{i['saving']:.3g}x less"
            )
        lines += [f"  note: {w}" for w in self.warnings]
        return "\n".join(x for x in lines if x)

    def __str__(self) -> str:
        return self.summary()


def plan(
    law: Any,
    *,
    budget: float | None = None,
    target_loss: float | None = None,
    hours: float | None = None,
    gpus: int = 1,
    gpu: str | None = None,
    mfu: float | None = None,
    flops_per_second: float | None = None,
    batch: int | None = None,
    hparams: Any = None,
    template: DiTConfig | None = None,
    image_size: int | None = None,
    aspect: float = 64.0,
    head_width: int = 64,
    params_kind: str | None = None,
    configure: bool = True,
    inference_images: float = 0.0,
    evaluations_per_image: float = 50.0,
) -> Plan:
    """Plan a training run.

    Args:
        law: a published law's name, a fit, or the file or study folder of one.
        budget: training compute in FLOPs; or
        target_loss: a loss to reach with least compute; or
        hours: wall time on ``gpus`` machines (needs ``gpu`` or ``flops_per_second``).
        gpus: how many machines. Default: 1.
        gpu: which machine, such as "h100".
        mfu: share of its peak that training reaches, measured. Default: 0.4, and the plan says that it is
            assumed.
        flops_per_second: of one machine in training, measured; instead of ``gpu`` and ``mfu``.
        batch: images a step, for the number of steps. Default: from the hyper-parameter law, else unknown.
        hparams: a law of batch and learning rate: a published name, or a fit of :func:`fit_hparams` or its
            file.
        template: the DiT's other fields. Default: a DiT/2 on 256-pixel latents.
        image_size: pixels on a side, instead of the template's.
        aspect: width over depth. Default: 64.
        head_width: Default: 64.
        params_kind: which parameters N means: "per_token" or "total". Default: "total" for one's own runs
            whose column is the total count, else "per_token".
        configure: design an integer DiT. Default: True.
        inference_images: images that the model will generate in its life; 0 to leave inference out.
        evaluations_per_image: forward passes to sample one (twice the steps with guidance). Default: 50.

    Returns:
        Plan.

    Raises:
        InputError: not exactly one of budget, target_loss and hours; a value that is not positive; an unknown
            law; a target loss below what the law can reach.
    """
    chosen = allocation(law)
    for name, value in (
        ("budget", budget),
        ("target-loss", target_loss),
        ("hours", hours),
        ("gpus", gpus),
        ("mfu", mfu),
        ("flops-per-second", flops_per_second),
        ("batch", batch),
        ("evaluations-per-image", evaluations_per_image),
    ):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise InputError(f"{name}: expected a positive number, got {value!r}")
    if mfu is not None and mfu > 1:
        raise InputError(f"mfu: expected a share of the peak between 0 and 1, got {mfu!r}")
    if not (np.isfinite(inference_images) and inference_images >= 0):
        raise InputError(f"inference-images: expected 0 or more, got {inference_images!r}")
    if sum(v is not None for v in (budget, target_loss, hours)) != 1:
        raise InputError("budget: expected exactly one of budget, target-loss and hours")
    rate, machine = _machine(gpu, mfu, flops_per_second, gpus)
    if hours is not None:
        if rate is None:
            raise InputError("gpu: expected a machine (--gpu or --flops-per-second) to turn hours into FLOPs")
        compute = hours * 3600.0 * gpus * rate
    elif target_loss is not None:
        compute = compute_for(chosen, target_loss)
    else:
        compute = float(budget)  # type: ignore[arg-type]

    best = chosen.optimum(compute)
    out = Plan(
        budget=compute,
        params=best["params"].value,
        data=best["data"].value if "data" in best else None,
        data_unit=chosen.data_unit,
        loss=best["loss"].value if "loss" in best else None,
        fid=best["fid"].value if "fid" in best else None,
        intervals={k: list(v.interval) if v.interval else None for k, v in best.items()},
        law=chosen.name,
        source=chosen.source,
        flop_convention=chosen.flop_convention,
        extrapolation=compute / chosen.budget_range[1] if chosen.budget_range else None,
        warnings=list(chosen.notes),
    )
    if chosen.data_unit == "tokens":
        out.tokens = out.data
    else:
        out.images = out.data
    out.quality = {k: v.value for k, v in best.items() if k not in ("params", "data", "loss")}
    _shape(out, chosen, configure, template, image_size, aspect, head_width, params_kind, batch, hparams)
    if machine and rate:
        total = compute / rate / 3600.0
        out.machine = {**machine, "gpu_hours": total, "hours": total / gpus}
    _flatness(out, chosen)
    _cost_of_being_wrong(out, chosen, best["params"])
    if inference_images:
        per_image = float(out.configuration["tokens_per_image"]) if out.configuration else 1.0
        units = evaluations_per_image * (per_image if chosen.data_unit == "tokens" else 1.0)
        _inference(out, chosen, inference_images * units)
    if out.extrapolation is not None and out.extrapolation > 1000:
        out.warnings.append(
            f"{out.extrapolation:.3g}x beyond the largest run behind this law: a guess, not a prediction"
        )
    return out


def _machine(
    gpu: str | None, mfu: float | None, flops_per_second: float | None, gpus: int
) -> tuple[float | None, dict[str, Any] | None]:
    if flops_per_second is not None:
        share = flops_per_second / peak_flops(gpu) if gpu else None
        return flops_per_second, {
            "gpu": gpu or "machine",
            "gpus": gpus,
            "mfu": share if share is not None else 1.0,
            "mfu_source": "measured" if gpu else "measured throughput",
        }
    if gpu is None:
        if mfu is not None:
            raise InputError("mfu: expected --gpu with it: a share of which machine's peak?")
        return None, None
    share = ASSUMED_MFU if mfu is None else mfu
    source = "assumed, not measured" if mfu is None else "given"
    return peak_flops(gpu) * share, {"gpu": gpu, "gpus": gpus, "mfu": share, "mfu_source": source}


def compute_for(law: Allocation, target: float) -> float:
    """Least compute that reaches a loss."""

    def gap(log_c: float) -> float:
        best = law.optimum(float(np.exp(log_c)))
        if "loss" not in best:
            raise InputError(f"target-loss: law {law.name} predicts no loss; give --budget")
        return best["loss"].value - target

    low, high = np.log(1e3), np.log(1e40)
    if gap(high) > 0:
        raise InputError(
            f"target-loss: expected a loss above the law's floor ({gap(high) + target:.4g}), got {target:g}"
        )
    if gap(low) < 0:
        raise InputError(f"target-loss: expected a loss below what an untrained model has, got {target:g}")
    return float(np.exp(optimize.brentq(gap, low, high, xtol=1e-12)))


def _shape(
    out: Plan,
    law: Allocation,
    configure: bool,
    template: DiTConfig | None,
    image_size: int | None,
    aspect: float,
    head_width: int,
    params_kind: str | None,
    batch: int | None,
    hparams: Any,
) -> None:
    from ditscale.dit.config import DiTConfig
    from ditscale.scaling.configurations import describe, design_config

    base = template or DiTConfig()
    if image_size is not None:
        base = base.replace(image_size=image_size)
    tokens_per_image = base.tokens
    if law.data_unit == "images" and out.data is not None:
        out.tokens = out.data * tokens_per_image
    elif out.data is not None:
        out.images = out.data / tokens_per_image
    hyper = _hyper_law(hparams) if hparams is not None else law
    run = (out.params, out.tokens, out.images, out.budget)
    if hyper.batch_tokens and out.tokens:
        out.batch_tokens = hyper.batch_tokens(*run)
        batch = batch or max(1, round(out.batch_tokens / tokens_per_image))
    if hyper.lr and out.tokens:
        out.lr = hyper.lr(*run)
    if not configure:
        return
    if not law.allocates:
        out.warnings.append("no configuration: this law's size is not a number of parameters")
        return
    kind = params_kind or "per_token"
    config = design_config(out.params, template=base, params_kind=kind, aspect=aspect, head_width=head_width)
    shape = describe(config, out.budget, batch)
    shape["params_kind"] = kind
    out.configuration = shape
    if law.loss_at and law.data_unit == "images":
        n = shape["params_per_token"] if kind == "per_token" else shape["params"]
        shape["loss"] = float(law.loss_at(float(n), float(shape["images"])))


def _hyper_law(hparams: Any) -> Any:
    from ditscale.scaling.hparams import hyper_law

    return hyper_law(hparams)


def _loss_along(law: Allocation, log_n: Any, budget: float) -> Any:
    n = np.exp(np.asarray(log_n, dtype=float))
    return law.loss_at(n, law.data_for(n, budget))  # type: ignore[misc]


def _flatness(out: Plan, law: Allocation) -> None:
    """How far N may leave the optimum, at the same compute, for 1 % more loss."""
    if law.loss_at is None or law.data_for is None:
        return
    middle = np.log(out.params)
    limit = float(_loss_along(law, middle, out.budget)) * (1.0 + _FLATNESS)
    ends = {}
    for name, side in (("smaller", -1.0), ("larger", 1.0)):
        far = middle + side * np.log(_FAR)
        if float(_loss_along(law, far, out.budget)) <= limit:
            ends[name] = float(np.exp(far - middle))
            continue
        edge = optimize.brentq(lambda x: float(_loss_along(law, x, out.budget)) - limit, *sorted((middle, far)))
        ends[name] = float(np.exp(edge - middle))
    out.flatness = {**ends, "loss_increase": _FLATNESS}


def _cost_of_being_wrong(out: Plan, law: Allocation, params: Estimate) -> None:
    """Train at either end of N_opt's interval: what loss comes of it, and what compute would have reached it
    at best.
    """
    if law.loss_at is None or law.data_for is None or params.interval is None:
        return
    base = float(_loss_along(law, np.log(params.value), out.budget))
    rows = {}
    for name, n in (("low", params.interval[0]), ("high", params.interval[1])):
        if not (np.isfinite(n) and n > 0):
            return
        loss = float(_loss_along(law, np.log(n), out.budget))
        if not np.isfinite(loss) or loss < base:
            return
        try:
            reached = compute_for(law, loss)
        except InputError:
            return
        rows[name] = {
            "params": n,
            "loss": loss,
            "wasted_compute": float(max(0.0, 1.0 - reached / out.budget)),
        }
    out.wrong = rows


def _inference(out: Plan, law: Allocation, forward_units: float) -> None:
    """Least training plus inference compute at the plan's loss (Sardana et al., arXiv:2401.00448).

    A forward pass costs a third of a training pass, so inference costs ``cost(N, 1) / 3`` for each unit of
    data.
    """
    if law.loss_at is None or law.cost is None or out.loss is None or out.data is None:
        out.warnings.append("inference left out: this law has no surface to trade size against data")
        return
    cost, loss_at, goal = law.cost, law.loss_at, float(law.loss_at(out.params, out.data))

    def data_at(log_n: float) -> float:
        n = float(np.exp(log_n))
        low, high = np.log(out.data) - 25.0, np.log(out.data) + 60.0  # type: ignore[arg-type]
        gap = lambda x: float(loss_at(n, np.exp(x))) - goal  # noqa: E731
        if gap(high) > 0:
            return float("inf")
        return float(np.exp(optimize.brentq(gap, low, high, xtol=1e-12)))

    def total(log_n: float) -> float:
        d = data_at(log_n)
        return (
            float(cost(np.exp(log_n), d) + forward_units * cost(np.exp(log_n), 1.0) / 3.0) if np.isfinite(d) else np.inf
        )

    grid = np.log(out.params) + np.linspace(-np.log(300.0), np.log(1.5), 120)
    values = np.array([total(x) for x in grid])
    i = int(np.argmin(values))
    low, high = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(total, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    n, d = float(np.exp(found.x)), data_at(float(found.x))
    plain_total = float(cost(out.params, out.data) + forward_units * cost(out.params, 1.0) / 3.0)
    out.inference = {
        "params": n,
        "data": d,
        "train_flops": float(cost(n, d)),
        "total_flops": float(found.fun),
        "saving": plain_total / float(found.fun),
    }
