"""The record of a finished run."""

from __future__ import annotations

import datetime
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import ditscale
from ditscale.dit.checkpoint import read_json
from ditscale.dit.flops import count
from ditscale.dit.training.config import TrainConfig
from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.data import ImageStream
    from ditscale.dit.training.state import TrainState


def describe(config: TrainConfig, state: TrainState, stream: ImageStream, status: str) -> dict[str, Any]:
    """The record of a run that has ended, without what its validation tells."""
    images = state.step * config.batch
    report = count(config.model)
    return {
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
        "flops": images * report.train,
        "flops_per_image": report.train,
        "flop_convention": report.convention,
        "images": images,
        "unique_images": min(images, stream.unique_images or images),
        "tokens": images * report.tokens,
        "steps": state.step,
        "batch": config.batch,
        "lr": config.lr,
        "lr_schedule": f"warmup {config.warmup_fraction:g}, {config.decay_shape} decay {config.decay_fraction:g}",
        "warmup_fraction": config.warmup_fraction,
        "ema_share": config.ema_share,
        "seed": config.seed,
        "objective": config.flow.record_name,
        "prediction": config.prediction,
        "loss_kind": config.flow.loss_kind,
        "loss_window": "final",
        "loss": None,
        "loss_weights": "averaged",
        "loss_by_timestep": None,
        "train_loss": state.smoothed if math.isfinite(state.smoothed) else None,
        "data": stream.name,
        "data_sha256": stream.sha256,
        "seconds": state.seconds,
        "images_per_second": images / state.seconds if state.seconds else None,
        "flops_per_second": images * report.train / state.seconds if state.seconds else None,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "started_at": state.started_at,
        "finished_at": now(),
    }


def check_record(path: Path, config: TrainConfig | None = None) -> dict[str, Any]:
    """Read a finished run's record; InputError where it is damaged or of another configuration."""
    record = read_json(path)
    if not isinstance(record, dict) or not {"run_id", "status", "flops", "loss"} <= record.keys():
        raise InputError(f"{path}: expected a finished run record, got a damaged one")
    if config is not None and record["run_id"] != config.run_id:
        raise InputError(f"{path}: expected the record of run {config.run_id}, got that of {record['run_id']}")
    return record


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"ditscale": ditscale.__version__, "torch": torch.__version__, "python": platform.python_version()}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
