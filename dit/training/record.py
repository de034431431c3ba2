"""The record of a finished run."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

import torch

import ditscale
from ditscale.dit.files import read_json
from ditscale.dit.flops import count
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.execution import Execution
from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.data import ImageStream
    from ditscale.dit.flow import ValidationSet
    from ditscale.dit.objective import Objective
    from ditscale.dit.training.ranks import Ranks
    from ditscale.dit.training.state import TrainState


# Fields of objectives that decide what is minimised and have no column of their own.
_OBJECTIVE_FIELDS = (
    *("time_mean", "time_std", "times", "shift"),
    *("timesteps", "schedule"),
    *("sigma_data", "log_mean", "log_std"),
)


class RunRecord(TypedDict, total=False):
    """What ``run.json`` holds: one flat row, so that records of many runs make a table.

    Who asks for a record may add fields of his own (``train(..., extra=...)``), such as a study's budget.
    """

    run_id: str  # names the configuration
    status: str  # "finished", or "diverged": the loss became NaN or infinite,
    reason: str  # and which loss, of a diverged run
    width: int
    depth: int
    heads: int
    patch: int
    image_size: int
    tokens_per_image: int
    params: int
    params_per_token: int  # of those, the ones that work once a token,
    params_per_sample: int  # once an image,
    params_embedding: int  # or are looked up
    flops: int  # training FLOPs by the ledger, in the named convention
    flops_per_image: int
    flop_convention: str
    flops_hardware: int  # with what is computed again
    images: int
    dataset_images: int | None  # images that the data holds; None where it never repeats
    unique_images: int  # different images among those seen
    epochs: float | None  # passes over the data; None where it never repeats
    tokens: int
    steps: int
    nonfinite_steps: int  # steps that left the weights alone because the loss or gradient was not finite,
    nonfinite: list[dict[str, Any]]  # and of each its number, images, seed, loss and gradient norm
    batch: int
    precision: str
    optimizer: str
    lr: float
    lr_schedule: str
    warmup_fraction: float
    ema: str
    ema_share: float
    seed: int
    objective: str  # with what of its path and times is not the default, as in "rectified_flow_v(shift=3)"
    prediction: str  # what the model gives: "velocity", "clean" (the image) or "epsilon" (the noise)
    loss_kind: str
    loss_window: str
    evaluation: str  # how many validation images and times, and a hash of them and of the noise, as in "128x8-<hash>"
    loss: float | None  # of the averaged weights on the fixed validation set
    loss_weights: str
    loss_by_timestep: list[float] | None
    timesteps: list[float]
    weights_sha256: str  # of weights.safetensors
    train_loss: float | None  # smoothed
    data: str
    data_sha256: str
    seconds: float  # of training, over all sessions
    images_per_second: float | None
    flops_per_second: float | None
    mfu: float | None  # model FLOPs a second over the device's peak; None where the peak is not known
    hfu: float | None
    device: str
    threads: int
    ranks: int
    parallel: str  # "none", "ddp", "fsdp" or "hsdp"
    recompute: str  # activations computed again in the backward pass: "none" or "block"
    compiled: bool
    microbatch: int
    versions: dict[str, str]
    started_at: str
    finished_at: str


def describe(
    config: TrainConfig, execution: Execution, ranks: Ranks, state: TrainState, stream: ImageStream, status: str
) -> RunRecord:
    """The record of a run that has ended, without what its validation tells.

    Raises:
        InputError: the data cannot be read any more.
    """
    images = state.step * config.batch
    report = count(config.model)
    pool = stream.unique_images
    meter = state.meter
    try:
        sha256 = stream.sha256
    except OSError as error:
        raise InputError(f"data: expected {stream.name} as it was trained on, got {error}") from error
    peak = meter.peak.flops * meter.devices * state.seconds if meter.peak is not None else 0.0
    record: RunRecord = {
        "run_id": config.run_id,
        "status": status,
        "width": config.model.width,
        "depth": config.model.depth,
        "heads": config.model.heads,
        "patch": config.model.patch,
        "image_size": config.model.image_size,
        "tokens_per_image": report.tokens,
        "params": report.params.total,
        "params_per_token": report.params.per_token,
        "params_per_sample": report.params.per_sample,
        "params_embedding": report.params.embedding,
        "flops": meter.model_flops,
        "flops_per_image": report.train,
        "flop_convention": report.convention,
        "flops_hardware": meter.hardware_flops,
        "images": images,
        "dataset_images": pool,
        "unique_images": images if pool is None else min(images, pool),
        "epochs": None if pool is None else images / pool,
        "tokens": images * report.tokens,
        "steps": state.step,
        "nonfinite_steps": len(state.nonfinite),
        "nonfinite": state.nonfinite,
        "batch": config.batch,
        "precision": config.precision,
        "optimizer": config.optimizer,
        "lr": config.lr,
        "lr_schedule": f"warmup {config.warmup_fraction:g}, {config.decay_shape} decay {config.decay_fraction:g}",
        "warmup_fraction": config.warmup_fraction,
        "ema": config.ema,
        "ema_share": config.ema_share,
        "seed": config.seed,
        "objective": objective_name(config.flow),
        "prediction": _prediction(config.flow),
        "loss_kind": config.flow.loss_kind,
        "loss_window": "final",
        "loss": None,
        "loss_weights": "averaged",
        "loss_by_timestep": None,
        "train_loss": state.smoothed if math.isfinite(state.smoothed) else None,
        "data": stream.name,
        "data_sha256": sha256,
        "seconds": state.seconds,
        "images_per_second": images / state.seconds if state.seconds else None,
        "flops_per_second": meter.model_flops / state.seconds if state.seconds else None,
        "mfu": meter.model_flops / peak if peak else None,
        "hfu": meter.hardware_flops / peak if peak else None,
        "device": device_name(ranks.device),
        "threads": torch.get_num_threads(),
        "ranks": ranks.count,
        "parallel": ranks.mode,
        "recompute": execution.recompute,
        "compiled": execution.compile,
        "microbatch": execution.microbatch or config.batch // ranks.count,
        "versions": versions(),
        "started_at": state.started_at,
        "finished_at": now(),
    }
    if status != "finished":
        last = state.nonfinite[-1]
        record["reason"] = f"loss {last['loss']}, gradient norm {last['gradient_norm']} in step {last['step']}"
    return record


def objective_name(flow: Objective) -> str:
    """An objective in records: its name, and what of its path and times is not the default.

    Runs that differ here minimise different things and share no law.
    """
    told = []
    for field in dataclasses.fields(flow):  # type: ignore[arg-type]
        value = getattr(flow, field.name)
        if field.name in _OBJECTIVE_FIELDS and value != field.default:
            told.append(f"{field.name}={value if isinstance(value, str) else f'{value:.10g}'}")
    return flow.record_name + (f"({', '.join(told)})" if told else "")


def validation_name(validation: ValidationSet) -> str:
    """A validation set in records: how many images and times, and a hash of them and of the noise.

    Of the times five digits, which every machine computes alike.
    """
    times = [f"{float(t):.5g}" for t in validation.times]
    digest = hashlib.sha256(repr((validation.seed, times, tuple(validation.images.shape))).encode())
    digest.update(validation.images.numpy().tobytes())
    return f"{len(validation.images)}x{len(times)}-{digest.hexdigest()[:12]}"


def _prediction(flow: Objective) -> str:
    """What a model of this objective predicts; EDM's preconditioning makes the clean image of the network's output."""
    return flow.prediction if isinstance(flow, RectifiedFlow) else {"ddpm": "epsilon", "edm": "clean"}[flow.name]


def check_record(path: Path, config: TrainConfig | None = None) -> RunRecord:
    """Read a finished run's record; InputError where it is damaged or of another configuration."""
    record = read_json(path)
    if not isinstance(record, dict) or not {"run_id", "status", "flops", "loss"} <= record.keys():
        raise InputError(f"{path}: expected a finished run record, got a damaged one")
    if config is not None and record["run_id"] != config.run_id:
        raise InputError(f"{path}: expected the record of run {config.run_id}, got that of {record['run_id']}")
    return cast(RunRecord, record)


def device_name(device: torch.device) -> str:
    """ "cpu", or an accelerator's name."""
    return device.type if device.type == "cpu" else torch.cuda.get_device_name(device)


def versions() -> dict[str, Any]:
    """The versions that a result depends on."""
    return {"ditscale": ditscale.__version__, "torch": torch.__version__, "python": platform.python_version()}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
