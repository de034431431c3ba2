"""The training loop: steps, checkpoints, metrics, and the record at the end."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ditscale.dit.checkpoint import (
    MetricsLog,
    folder_lock,
    load_checkpoint,
    read_json,
    remove_checkpoints,
    save_checkpoint,
    write_json,
)
from ditscale.dit.training.batches import Reader, open_stream, seed_for, validation_set
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.record import check_record, describe
from ditscale.dit.training.state import TrainState
from ditscale.dit.weights import save_weights
from ditscale.errors import InputError

# The smoothing of the training loss in the metrics, as the decay of an exponential average over images.
_SMOOTHING_IMAGES = 1024.0


class Stopped(Exception):
    """Training was asked to stop, wrote a checkpoint and did."""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    checkpoint_seconds: float = 20.0,
    progress: Callable[[int, int, float], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    say: Callable[[str], None] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train, or go on training, or hand back the record of a run that is done.

    Args:
        config: what to train.
        out: the run's folder; holds config.json, metrics.jsonl, checkpoints while it trains, and at the end
            ``weights.safetensors`` (averaged weights) and ``run.json``, the record.
        checkpoint_seconds: time between checkpoints. Default: 20.
        progress: called after each step with (steps done, steps, smoothed training loss). Default: None.
        should_stop: asked after each step; where it says yes, a checkpoint is written and Stopped raised. Default: None.
        say: takes sentences that a person should see, such as a damaged checkpoint. Default: stderr.
        extra: more fields for the record, such as a study's budget. Default: None.

    Returns:
        The run record, flat: what was trained, on what, with how many FLOPs, and the losses.

    Raises:
        InputError: the folder holds another run, or is in use, or cannot be written.
        Stopped: ``should_stop`` said so; the same call goes on from there.
    """
    folder = Path(out)
    say = say or (lambda sentence: print(f"ditscale: {sentence}", file=sys.stderr))
    with folder_lock(folder):
        _claim(folder, config)
        record_path = folder / "run.json"
        if record_path.exists():
            try:
                return check_record(record_path, config)
            except InputError as error:
                say(f"{error}; training this run again")
                record_path.unlink()
        record = _Run(config, folder, say).train(checkpoint_seconds, progress, should_stop) | dict(extra or {})
        write_json(record_path, record)
        remove_checkpoints(folder)
        return record


def _claim(folder: Path, config: TrainConfig) -> None:
    """Make the folder this run's; InputError where it is not empty and holds something else."""
    path = folder / "config.json"
    if not path.exists():
        foreign = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
        if foreign:
            raise InputError(
                f"{folder}: expected an empty folder or a run of this configuration, got {foreign[0]!r} in it"
            )
        write_json(path, config.to_dict())
    elif TrainConfig.from_dict(read_json(path)).run_id != config.run_id:
        raise InputError(f"{folder}: expected an empty folder or a run of this configuration, got another run's")


class _Run:
    """The state of one training run and its loop."""

    def __init__(self, config: TrainConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.config, self.folder, self.say = config, folder, say
        self.flow = config.flow
        self.stream = open_stream(config, "train")
        self.read = Reader(self.stream, config.model, config.batch)
        self.state = TrainState(config)
        checkpoint, complaints = load_checkpoint(folder)
        for complaint in complaints:
            say(complaint)
        if checkpoint is not None:
            self.state.restore(checkpoint, folder)

    def train(
        self,
        checkpoint_seconds: float,
        progress: Callable[[int, int, float], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> dict[str, Any]:
        config = self.config
        schedule, per_image = config.schedule, config.flops_per_image
        log = MetricsLog(self.folder / "metrics.jsonl", keep_to_step=self.state.step)
        # About two hundred lines a run, whatever its length.
        log_every = max(1, config.steps // 200)
        clock = last_save = time.perf_counter()
        status = "finished"
        try:
            while self.state.step < config.steps:
                loss = self._one_step(schedule.factor(self.state.step))
                self.state.step += 1
                if not math.isfinite(loss):
                    status = "diverged"
                    self.say(
                        f"{self.folder.name}: the loss became {loss} at step {self.state.step}, seed {config.seed}; stopped"
                    )
                    break
                weight = 1 - math.exp(-config.batch / _SMOOTHING_IMAGES)
                self.state.smoothed = (
                    loss
                    if math.isnan(self.state.smoothed)
                    else self.state.smoothed + weight * (loss - self.state.smoothed)
                )
                if self.state.step % log_every == 0 or self.state.step == config.steps:
                    images = self.state.step * config.batch
                    log.append(
                        {
                            "step": self.state.step,
                            "images": images,
                            "flops": images * per_image,
                            "train_loss": self.state.smoothed,
                            "lr": config.lr * schedule.factor(self.state.step - 1),
                        }
                    )
                if progress is not None:
                    progress(self.state.step, config.steps, self.state.smoothed)
                if self.state.step == config.steps:
                    break
                now = time.perf_counter()
                stop = should_stop is not None and should_stop()
                if stop or now - last_save > checkpoint_seconds:
                    self.state.seconds += now - clock
                    clock = now
                    save_checkpoint(self.folder, self.state.checkpoint())
                    last_save = time.perf_counter()
                if stop:
                    raise Stopped(f"{self.folder.name} at step {self.state.step} of {config.steps}")
            self.state.seconds += time.perf_counter() - clock
        finally:
            log.close()
        return self._finish(status)

    def _one_step(self, rate_factor: float) -> float:
        config = self.config
        generator = torch.Generator().manual_seed(seed_for(config.seed, f"step {self.state.step}"))
        x_0, y = self.read(self.state.step)
        eps = torch.randn(x_0.shape, generator=generator)
        t = self.flow.sample_times(config.batch, generator)
        drop = None
        if y is not None:
            drop = torch.rand(config.batch, generator=generator) < config.condition_dropout
        for group, rate in zip(self.state.optimizer.param_groups, self.state.base_rates, strict=True):
            group["lr"] = rate * rate_factor
        self.state.optimizer.zero_grad(set_to_none=True)
        loss = self.flow.loss(self.state.model, x_0, y, eps, t, drop).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.state.model.parameters(), config.clip)
        self.state.optimizer.step()
        self.state.average.update(self.state.model, self.state.step + 1)
        return float(loss.detach())

    def _finish(self, status: str) -> dict[str, Any]:
        """The record; of a finished run also the validation loss of the averaged weights, which are written."""
        record = describe(self.config, self.state, self.stream, status)
        if status == "finished":
            model = self.state.model
            validation = validation_set(self.config)
            self.state.average.copy_to(model)
            averaged = validation.loss(model, self.flow)
            record["loss"] = math.fsum(averaged) / len(averaged)
            record["loss_by_timestep"] = averaged
            record["timesteps"] = [float(t) for t in validation.times]
            save_weights(self.folder / "weights.safetensors", model, self.flow)
        return record
