"""Plans: from a budget, a target loss or a deadline to what to train, for how long, and how good it will be."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.allocation import Allocation, allocation
from ditscale.scaling.checks import need_least, need_positive
from ditscale.scaling.gpus import ASSUMED_MFU, peak_flops
from ditscale.scaling.hyper import HyperLaw, hyper_law
from ditscale.scaling.jsonable import plain
from ditscale.scaling.nextruns import NextRuns, suggest_runs
from ditscale.scaling.quality import saved_quality
from ditscale.scaling.tradeoffs import compute_for, cost_of_being_wrong, flatness, with_inference

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig
    from ditscale.scaling.study import Study


_QUALITY_NAMES = {"fid": "FID", "frechet_distance": "Fréchet"}


@dataclass
class Plan:
    """What to train with a budget.

    Attributes:
        budget: training compute in FLOPs.
        params, data: the compute-optimal run, D in ``data_unit``.
        loss: its predicted loss, None where the law has none.
        intervals: 95 % intervals by name (that of the loss is for one new run), None where the law comes
            without.
        fid: predicted FID, None where no law has it.
        quality: every predicted quality by its metric, and ``feature_network``, whose features a quality law of one's own
            compares.
        tokens, images: D in both units where the number of tokens of an image is known.
        configuration: an integer DiT near the optimum, trained on the whole budget (see
            ``configurations.py``), or None.
        batch_tokens, lr: batch in tokens and peak learning rate: of a hyper-parameter law, else of the study behind
            the law; None without either.
        machine: ``hours`` of wall time, ``gpu_hours``, ``gpus``, ``gpu``, ``flops_per_second`` of one, ``mfu`` (None where
            its peak is not known) and ``mfu_source``; None without a machine.
        flatness: how much smaller or larger a model costs 1 % more loss at the same compute, None without a
            surface.
        inference: the run of least training plus inference compute at the same loss, None if not asked.
        wrong: what it costs if N_opt stands at either end of its interval, None without a surface.
        next_runs: the runs that would narrow the interval of the loss most, None without one's own surface.
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
    feature_network: str | None = None
    configuration: dict[str, Any] | None = None
    batch_tokens: float | None = None
    lr: float | None = None
    machine: dict[str, Any] | None = None
    flatness: dict[str, float] | None = None
    inference: dict[str, float] | None = None
    wrong: dict[str, Any] | None = None
    next_runs: NextRuns | None = None
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

        features = f"on {self.feature_network} features" if self.feature_network else ""
        lines: list[str | None] = [f"plan for {self.budget:.4g} training FLOPs by {self.law} ({self.source})"]
        counted = "as the runs count them" if self.flop_convention == "measured" else self.flop_convention
        lines += [f"  FLOPs: {counted}"]
        lines += [
            line("parameters", self.params, "params"),
            line("data", self.data, "data", self.data_unit),
            line("loss", self.loss, "loss"),
            *(line(_QUALITY_NAMES.get(k, k), v, k, features) for k, v in self.quality.items()),
            line("learning rate", self.lr, "lr"),
            line("batch", self.batch_tokens, "batch_tokens", "tokens"),
        ]
        if self.extrapolation is not None:
            lines.append(f"  {self.extrapolation:.3g}x the largest compute behind the law")
        if self.configuration:
            c = self.configuration
            lines.append(
                f"  DiT: depth {c['depth']}, width {c['width']}, heads {c['heads']}, patch {c['patch']} at "
                f"{c['image_size']} px: {c['params'] / 1e6:.4g} M parameters ({c['params_per_token'] / 1e6:.4g} M "
                "per token), "
                f"{c['images']:.4g} images" + (f", {c['steps']} steps of {c['batch']}" if c["steps"] else "")
            )
        if self.machine:
            m = self.machine
            rate = f"MFU {m['mfu']:.2f}" if m["mfu"] is not None else f"{m['flops_per_second']:.4g} FLOP/s each"
            lines.append(
                f"  {m['gpu_hours']:.4g} GPU-hours, {m['hours']:.4g} h on {m['gpus']} x {m['gpu']} at {rate} "
                f"({m['mfu_source']})"
            )
        if self.flatness:
            lines.append(
                f"  flat: {self.flatness['smaller']:.3g}x to {self.flatness['larger']:.3g}x of N costs at "
                f"most 1 % more loss"
            )
        if self.wrong:
            ends_of = (
                f"N {row['params']:.4g} gives loss {row['loss']:.4g} and wastes {100 * row['wasted_compute']:.2g} %"
                for row in self.wrong.values()
            )
            lines.append(f"  at the ends of the interval of N: {'; '.join(ends_of)} of the compute")
        if self.inference:
            i = self.inference
            lines.append(
                f"  with inference: N {i['params']:.4g}, D {i['data']:.4g} at the same loss, total compute "
                f"{i['saving']:.3g}x less"
            )
        if self.next_runs:
            lines += ["  to narrow the interval of the loss:", *self.next_runs.summary().splitlines()[1:]]
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
    quality: Any = None,
    template: DiTConfig | None = None,
    image_size: int | None = None,
    aspect: float | None = None,
    head_width: int | None = None,
    params_kind: str | None = None,
    configure: bool = True,
    inference_images: float = 0.0,
    evaluations_per_image: float = 50.0,
    spend: float | None = None,
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
        flops_per_second: of one machine in training, measured; instead of ``mfu``. With ``gpu`` the plan says which share of
            its peak that is.
        batch: images a step, for the number of steps. Default: from the hyper-parameter law, else the study's, else
            unknown.
        hparams: a law of batch and learning rate: a published name, or a fit of :func:`fit_hparams` or its
            file.
        quality: a law of quality against compute, of :func:`ditscale.scaling.quality.fit_quality_of_runs`, or its file.
        template: the DiT's other fields. Default: the models of the study, where the law is a study's folder or
            laws.json, else a DiT/2 on 256-pixel latents.
        image_size: pixels on a side, instead of the template's.
        aspect: width over depth. Default: the study's rule, else 64.
        head_width: Default: the study's rule, else 64.
        params_kind: which parameters N means: "per_token" or "total". Default: what the column of one's own runs
            counts, "per_token" for published laws.
        configure: design an integer DiT. Default: True.
        inference_images: images that the model will generate in its life; 0 to leave inference out.
        evaluations_per_image: forward passes to sample one (twice the steps with guidance). Default: 50.
        spend: FLOPs for the next runs that the plan suggests, where the law is a surface fitted to runs. Default: what
            those runs cost, at most a tenth of the budget.

    Returns:
        Plan.

    Raises:
        InputError: not exactly one of budget, target_loss and hours; a value that is not positive; an unknown
            law; a target loss below what the law can reach; more throughput than the machine's peak; ``gpus`` without a
            machine or ``spend`` without a surface.
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
        ("spend", spend),
    ):
        if value is not None:
            need_positive(name, value)
    need_least("inference-images", inference_images)
    goals = {"budget": budget, "target-loss": target_loss, "hours": hours}
    given = {name: value for name, value in goals.items() if value is not None}
    if len(given) != 1:
        raise InputError(
            f"budget: expected exactly one of budget, target-loss and hours, got {' and '.join(given) or 'none'}"
        )
    rate, machine = machine_rate(gpu, mfu, flops_per_second, gpus)
    compute = _compute(chosen, *given.popitem(), gpus, rate)

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
    out.quality = {k: v.value for k, v in best.items() if k not in ("params", "data", "loss", "lr", "batch_tokens")}
    if quality is not None:
        of_images = saved_quality(quality)
        prediction = of_images.predict(compute)
        out.quality[of_images.metric] = prediction.value
        out.intervals[of_images.metric] = prediction.new_run
        out.feature_network = of_images.feature_network
        out.fid = prediction.value if of_images.metric == "fid" else out.fid
    models = _models(law, template, image_size, aspect, head_width)
    _shape(out, chosen, models, configure, params_kind, batch, hparams)
    if machine and rate:
        total = compute / rate / 3600.0
        out.machine = {**machine, "flops_per_second": rate, "gpu_hours": total, "hours": total / gpus}
    flatness(out, chosen)
    cost_of_being_wrong(out, chosen, best["params"])
    if inference_images:
        units = evaluations_per_image * (models.tokens if chosen.data_unit == "tokens" else 1.0)
        with_inference(out, chosen, inference_images * units)
    out.next_runs = _next_runs(chosen, compute, spend)
    if out.extrapolation is not None and out.extrapolation > 1000:
        out.warnings.append(
            f"{out.extrapolation:.3g}x beyond the largest run behind this law: a guess, not a prediction"
        )
    return out


def _compute(law: Allocation, goal: str, value: float, gpus: int, rate: float | None) -> float:
    """Training FLOPs of a goal: a "budget" of them, a "target-loss" to reach with the least, or "hours" of machines."""
    if goal == "hours":
        if rate is None:
            raise InputError("gpu: expected a machine (--gpu or --flops-per-second) to turn hours into FLOPs")
        return value * 3600.0 * gpus * rate
    if rate is None and gpus != 1:
        raise InputError(f"gpus: expected a machine with it (--gpu or --flops-per-second), got {gpus} of none")
    return compute_for(law, value) if goal == "target-loss" else float(value)


def machine_rate(
    gpu: str | None, mfu: float | None, flops_per_second: float | None, gpus: int
) -> tuple[float | None, dict[str, Any] | None]:
    """FLOP/s of one machine in training, and what is known of it; None and None where none is named.

    Raises:
        InputError: an unknown machine, an MFU that is no share, throughput above the peak, or an MFU beside a throughput.
    """
    if mfu is not None and need_positive("mfu", mfu) > 1:
        raise InputError(f"mfu: expected a share of the peak between 0 and 1, got {mfu!r}")
    if flops_per_second is not None:
        if mfu is not None:
            raise InputError(f"mfu: expected it or --flops-per-second, got both ({mfu!r} and {flops_per_second:.4g})")
        share = flops_per_second / peak_flops(gpu) if gpu else None
        if share is not None and share > 1:
            raise InputError(
                f"flops-per-second: expected at most {peak_flops(gpu or ''):.4g}, the peak of {gpu}, got {flops_per_second:.4g}"
            )
        source = "measured" if gpu else "measured throughput"
        return flops_per_second, {"gpu": gpu or "machine", "gpus": gpus, "mfu": share, "mfu_source": source}
    if gpu is None:
        if mfu is not None:
            raise InputError("mfu: expected --gpu with it: a share of which machine's peak?")
        return None, None
    share = ASSUMED_MFU if mfu is None else mfu
    source = "assumed, not measured" if mfu is None else "given"
    return peak_flops(gpu) * share, {"gpu": gpu, "gpus": gpus, "mfu": share, "mfu_source": source}


@dataclass(frozen=True)
class _Models:
    """What a plan chooses its DiT from.

    Attributes:
        tokens: of one image.
        nearest: (parameters, which of them count) -> the DiT.
        batch: that all of them train with, None where that is open.
        rate: images -> the learning rate of a run of so many, None where that is open.
    """

    tokens: int
    nearest: Callable[[float, str], DiTConfig]
    batch: int | None = None
    rate: Callable[[float], float] | None = None


def _models(
    law: Any, template: DiTConfig | None, image_size: int | None, aspect: float | None, head_width: int | None
) -> _Models:
    """The study's own models where the law is a study's and no other template or rule was asked for."""
    from ditscale.dit.config import DiTConfig
    from ditscale.scaling.configurations import ASPECT, HEAD_WIDTH, design_config

    study = _study_behind(law) if template is None else None
    batch, rate = None, None
    if study is not None:
        family = study.config if image_size is None else study.config.at(image_size)
        base = family.size(family.widths[0] if family.widths else family.head_width)
        batch = study.plan["training"]["batch"]
        rate = functools.partial(study.config.rate, study.plan["training"]["lr"])
        if aspect is None and head_width is None:
            return _Models(base.tokens, family.nearest, batch, rate)
    else:
        base = template or DiTConfig()
        base = base if image_size is None else base.replace(image_size=image_size)

    def nearest(params: float, kind: str) -> DiTConfig:
        return design_config(
            params,
            template=base,
            params_kind=kind,
            aspect=ASPECT if aspect is None else aspect,
            head_width=HEAD_WIDTH if head_width is None else head_width,
        )

    return _Models(base.tokens, nearest, batch, rate)


def _study_behind(law: Any) -> Study | None:
    """The study whose folder, or whose laws.json, a law is read from."""
    if not isinstance(law, (str, Path)):
        return None
    folder = Path(law)
    folder = folder.parent if folder.name == "laws.json" else folder
    if not (folder / "study.json").is_file():
        return None
    from ditscale.scaling.study import Study

    return Study(folder)


def _shape(
    out: Plan,
    law: Allocation,
    models: _Models,
    configure: bool,
    params_kind: str | None,
    batch: int | None,
    hparams: Any,
) -> None:
    from ditscale.scaling.configurations import describe

    tokens_per_image = models.tokens
    if law.data_unit == "images" and out.data is not None:
        out.tokens = out.data * tokens_per_image
    elif out.data is not None:
        out.images = out.data / tokens_per_image
    hyper = hyper_law(hparams) if hparams is not None else law
    if out.tokens is not None and out.images is not None:
        run = (out.params, out.tokens, out.images, out.budget)
        if hyper.batch_tokens:
            out.batch_tokens = hyper.batch_tokens(*run)
            batch = batch or max(1, round(out.batch_tokens / tokens_per_image))
        if hyper.lr:
            out.lr = hyper.lr(*run)
        if isinstance(hyper, HyperLaw):
            out.intervals.update({name: ends(*run) for name, ends in hyper.intervals.items()})
    elif hyper.batch_tokens or hyper.lr:
        out.warnings.append(
            f"no batch or learning rate by a law of them: {law.name} says nothing of the data, which they need"
        )
    if batch is None and models.batch is not None:
        batch = models.batch
    if out.batch_tokens is None and batch is not None and models.batch is not None:
        out.batch_tokens = float(batch * tokens_per_image)
    if out.lr is None and models.rate is not None and out.images is not None:
        out.lr = models.rate(out.images)
    if not configure:
        return
    if not law.allocates:
        out.warnings.append("no configuration: this law's size is not a number of parameters")
        return
    kind = params_kind or law.counts
    config = models.nearest(out.params, kind)
    shape = describe(config, out.budget, batch)
    shape["params_kind"] = kind
    out.configuration = shape
    if law.loss_at and law.data_unit == "images":
        n = shape["params_per_token"] if kind == "per_token" else shape["params"]
        shape["loss"] = float(law.loss_at(float(n), float(shape["images"])))


def _next_runs(law: Allocation, budget: float, spend: float | None) -> NextRuns | None:
    fit = law.surface
    if fit is None or fit.cost is None or not fit.allocates:
        if spend is not None:
            raise InputError(
                f"spend: expected a surface fitted to runs, which can suggest the next, got law {law.name}"
            )
        return None
    if spend is not None:
        return suggest_runs(fit, target=budget, spend=spend)
    made = float(np.sum(fit.cost.flops(fit.fit.inputs["params"], fit.fit.inputs["data"])))
    try:
        return suggest_runs(fit, target=budget, spend=min(made, 0.1 * budget))
    except InputError:
        return None
