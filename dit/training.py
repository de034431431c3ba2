"""Train one DiT: from a configuration to a finished, replayable run record, through any number of interruptions.

Every random number follows from the seed and the step, not from what was drawn before, so a run that was killed and
resumed ends with the same bits as one that was not (same machine, versions and number of threads).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import ditscale
from ditscale.dit.checkpoint import (
    Checkpoint,
    MetricsLog,
    folder_lock,
    load_checkpoint,
    read_json,
    remove_checkpoints,
    save_checkpoint,
    write_json,
)
from ditscale.dit.config import DiTConfig
from ditscale.dit.data import EmojiScenes, ImageBatch, ImageFolder, ImageStream, to_float
from ditscale.dit.flops import count
from ditscale.dit.flow import RectifiedFlow, ValidationSet
from ditscale.dit.model import DiT
from ditscale.dit.optim import Schedule, WeightAverage, parameter_groups
from ditscale.errors import InputError

LOSS_KIND = "velocity_mse"
OBJECTIVE = "rectified_flow_v"
# The smoothing of the training loss in the metrics, as the decay of an exponential average over images.
_SMOOTHING_IMAGES = 1024.0


class Stopped(Exception):
    """Training was asked to stop, wrote a checkpoint and did."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's result.

    Args:
        model: the DiT.
        data: the images: "emoji_scenes", the embedded endless captioned scenes, or the path of a folder of images.
            Default: "emoji_scenes".
        prediction: what the network's output stands for, "velocity" or "clean"; see :class:`RectifiedFlow`. The loss is
            the velocity's either way. Default: "velocity".
        batch: images a step. Default: 16.
        images: images in the whole run, rounded down to whole batches. Give this or ``flops``.
        flops: training FLOPs to spend by the ledger (convention ``matmul``), rounded down to whole batches.
        lr: peak learning rate, at ``model.mup_base_width`` where that is set. Default: 2e-3.
        beta1, beta2, weight_decay: of AdamW. Default: 0.9, 0.95, 0.
        clip: largest norm of the gradient. Default: 1.0.
        warmup_fraction, decay_fraction: shares of the steps. Default: 0.05 and 0.5.
        decay_shape: "linear" or "cosine". Default: "linear".
        condition_dropout: share of training images that see no condition. Default: 0.1.
        ema_share: share of training that the averaged weights remember. Default: 0.05.
        evaluation_images: images of the fixed validation set. Default: 128.
        evaluation_times: times at which each is evaluated. Default: 8.
        seed: of weights, data, noise and times. Default: 0.
        evaluation_seed: of the validation images and noise; the same for runs that are compared. Default: 0.

    Raises:
        InputError: a value is not possible; names it, what was expected and what came.
    """

    model: DiTConfig
    data: str = "emoji_scenes"
    prediction: str = "velocity"
    batch: int = 16
    images: int | None = None
    flops: int | None = None
    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.5
    decay_shape: str = "linear"
    condition_dropout: float = 0.1
    ema_share: float = 0.05
    evaluation_images: int = 128
    evaluation_times: int = 8
    seed: int = 0
    evaluation_seed: int = 0

    def __post_init__(self) -> None:
        if (self.images is None) == (self.flops is None):
            raise InputError(f"images, flops: expected exactly one of them, got {self.images!r} and {self.flops!r}")
        _ = self.flow  # checks the prediction's name
        for field in ("batch", "evaluation_images", "evaluation_times"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{field}: expected a whole number of at least 1, got {value!r}")
        for field in ("lr", "clip"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value > 0):
                raise InputError(f"{field}: expected a positive number, got {value!r}")
        for field in ("warmup_fraction", "decay_fraction", "condition_dropout", "ema_share", "beta1", "beta2"):
            value = getattr(self, field)
            if not (isinstance(value, (int, float)) and 0 <= value <= 1):
                raise InputError(f"{field}: expected a number from 0 to 1, got {value!r}")
        if self.steps < 1:
            asked = f"{self.images} images" if self.images is not None else f"{self.flops:.4g} FLOPs"
            raise InputError(
                f"{'images' if self.images is not None else 'flops'}: expected enough for one batch of {self.batch} "
                f"({self.batch * self.flops_per_image:.4g} FLOPs), got {asked}"
            )

    @property
    def flops_per_image(self) -> int:
        """Training FLOPs of one image, by the ledger."""
        return count(self.model).train

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        images = self.images if self.images is not None else int(self.flops or 0) // self.flops_per_image
        return int(images) // self.batch

    @property
    def flow(self) -> RectifiedFlow:
        """The objective."""
        return RectifiedFlow(prediction=self.prediction)

    @property
    def schedule(self) -> Schedule:
        """The learning rate's course over the steps."""
        warmup = min(self.steps, math.ceil(self.warmup_fraction * self.steps))
        decay = min(self.steps - warmup, math.ceil(self.decay_fraction * self.steps))
        return Schedule(self.steps, warmup, decay, self.decay_shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; unknown fields raise InputError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"training.{unknown[0]}: no such field (fields: {', '.join(sorted(known))})")
        if "model" not in values:
            raise InputError("training: expected a [model] table, got none")
        model = values["model"]
        model = model if isinstance(model, DiTConfig) else DiTConfig.from_table(model)
        return cls(**{**values, "model": model})

    @property
    def run_id(self) -> str:
        """A readable name that ends in a hash of all that decides the result."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"d{self.model.width}-l{self.model.depth}-{digest}"


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


def check_record(path: Path, config: TrainConfig | None = None) -> dict[str, Any]:
    """Read a finished run's record; InputError where it is damaged or of another configuration."""
    record = read_json(path)
    if not isinstance(record, dict) or not {"run_id", "status", "flops", "loss"} <= record.keys():
        raise InputError(f"{path}: expected a finished run record, got a damaged one")
    if config is not None and record["run_id"] != config.run_id:
        raise InputError(f"{path}: expected the record of run {config.run_id}, got that of {record['run_id']}")
    return record


def _claim(folder: Path, config: TrainConfig) -> None:
    path = folder / "config.json"
    # JSON has no tuples, so compare what would be read back.
    mine = json.loads(json.dumps(config.to_dict()))
    if not path.exists():
        foreign = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
        if foreign:
            raise InputError(
                f"{folder}: expected an empty folder or a run of this configuration, got {foreign[0]!r} in it"
            )
        write_json(path, mine)
    elif read_json(path) != mine:
        raise InputError(f"{folder}: expected an empty folder or a run of this configuration, got another run's")


class _Run:
    """The state of one training run and its loop."""

    def __init__(self, config: TrainConfig, folder: Path, say: Callable[[str], None]) -> None:
        self.config, self.folder, self.say = config, folder, say
        torch.manual_seed(_seed(config.seed, "weights"))
        self.model = DiT(config.model)
        self.flow = config.flow
        self.stream = open_stream(config, "train")
        self.read = _Reader(self.stream, config.model, config.batch)
        groups = parameter_groups(self.model, lr=config.lr, weight_decay=config.weight_decay)
        self.base_rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
        self.average = WeightAverage(self.model, share=config.ema_share)
        self.step = 0
        self.smoothed = math.nan
        self.seconds = 0.0
        self.started_at = _now()
        self._resume()

    def _resume(self) -> None:
        checkpoint, complaints = load_checkpoint(self.folder)
        for complaint in complaints:
            self.say(complaint)
        if checkpoint is None:
            return
        tensors = checkpoint.tensors
        try:
            names = [name for name, _ in self.model.named_parameters()]
            parameters = dict(self.model.named_parameters())
            with torch.no_grad():
                for name in names:
                    parameters[name].copy_(tensors[f"model.{name}"])
                    self.average.weights[name].copy_(tensors[f"average.{name}"])
            for name in names:
                self.optimizer.state[parameters[name]] = {
                    "step": tensors[f"adam_step.{name}"],
                    "exp_avg": tensors[f"adam_m.{name}"],
                    "exp_avg_sq": tensors[f"adam_v.{name}"],
                }
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{self.folder}: expected a checkpoint of this model, got {error}") from error
        self.step = checkpoint.step
        self.smoothed = checkpoint.state["smoothed"]
        self.seconds = checkpoint.state["seconds"]
        self.started_at = checkpoint.state["started_at"]

    def _save(self) -> None:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter
            tensors[f"average.{name}"] = self.average.weights[name]
            tensors[f"adam_step.{name}"] = state["step"]
            tensors[f"adam_m.{name}"] = state["exp_avg"]
            tensors[f"adam_v.{name}"] = state["exp_avg_sq"]
        state = {"smoothed": self.smoothed, "seconds": self.seconds, "started_at": self.started_at}
        save_checkpoint(self.folder, Checkpoint(self.step, tensors, state))

    def train(
        self,
        checkpoint_seconds: float,
        progress: Callable[[int, int, float], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> dict[str, Any]:
        config = self.config
        schedule, per_image = config.schedule, config.flops_per_image
        log = MetricsLog(self.folder / "metrics.jsonl", keep_to_step=self.step)
        # About two hundred lines a run, whatever its length.
        log_every = max(1, config.steps // 200)
        clock = last_save = time.perf_counter()
        status = "finished"
        try:
            while self.step < config.steps:
                loss = self._one_step(schedule.factor(self.step))
                self.step += 1
                if not math.isfinite(loss):
                    status = "diverged"
                    self.say(
                        f"{self.folder.name}: the loss became {loss} at step {self.step}, seed {config.seed}; stopped"
                    )
                    break
                weight = 1 - math.exp(-config.batch / _SMOOTHING_IMAGES)
                self.smoothed = loss if math.isnan(self.smoothed) else self.smoothed + weight * (loss - self.smoothed)
                if self.step % log_every == 0 or self.step == config.steps:
                    images = self.step * config.batch
                    log.append(
                        {
                            "step": self.step,
                            "images": images,
                            "flops": images * per_image,
                            "train_loss": self.smoothed,
                            "lr": config.lr * schedule.factor(self.step - 1),
                        }
                    )
                if progress is not None:
                    progress(self.step, config.steps, self.smoothed)
                if self.step == config.steps:
                    break
                now = time.perf_counter()
                stop = should_stop is not None and should_stop()
                if stop or now - last_save > checkpoint_seconds:
                    self.seconds += now - clock
                    clock = now
                    self._save()
                    last_save = time.perf_counter()
                if stop:
                    raise Stopped(f"{self.folder.name} at step {self.step} of {config.steps}")
            self.seconds += time.perf_counter() - clock
        finally:
            log.close()
        return self._record(status)

    def _one_step(self, rate_factor: float) -> float:
        config = self.config
        generator = torch.Generator().manual_seed(_seed(config.seed, f"step {self.step}"))
        x_0, y = self.read(self.step)
        eps = torch.randn(x_0.shape, generator=generator)
        t = self.flow.sample_times(config.batch, generator)
        drop = None
        if y is not None:
            drop = torch.rand(config.batch, generator=generator) < config.condition_dropout
        for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * rate_factor
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.flow.loss(self.model, x_0, y, eps, t, drop).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip)
        self.optimizer.step()
        self.average.update(self.model, self.step + 1)
        return float(loss.detach())

    def _record(self, status: str) -> dict[str, Any]:
        config = self.config
        images = self.step * config.batch
        report = count(config.model)
        record: dict[str, Any] = {
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
            "unique_images": min(images, self.stream.unique_images or images),
            "tokens": images * report.tokens,
            "steps": self.step,
            "batch": config.batch,
            "lr": config.lr,
            "lr_schedule": f"warmup {config.warmup_fraction:g}, {config.decay_shape} decay {config.decay_fraction:g}",
            "warmup_fraction": config.warmup_fraction,
            "ema_share": config.ema_share,
            "seed": config.seed,
            "objective": OBJECTIVE,
            "prediction": config.prediction,
            "loss_kind": LOSS_KIND,
            "loss_window": "final",
            "loss": None,
            "loss_weights": "averaged",
            "loss_by_timestep": None,
            "train_loss": self.smoothed if math.isfinite(self.smoothed) else None,
            "data": self.stream.name,
            "data_sha256": self.stream.sha256,
            "seconds": self.seconds,
            "images_per_second": images / self.seconds if self.seconds else None,
            "flops_per_second": images * report.train / self.seconds if self.seconds else None,
            "device": "cpu",
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "started_at": self.started_at,
            "finished_at": _now(),
        }
        if status == "finished":
            validation = validation_set(config)
            self.average.copy_to(self.model)
            averaged = validation.loss(self.model, self.flow)
            record["loss"] = math.fsum(averaged) / len(averaged)
            record["loss_by_timestep"] = averaged
            record["timesteps"] = [float(t) for t in validation.times]
            save_weights(self.folder / "weights.safetensors", self.model, self.flow)
        return record


def validation_set(config: TrainConfig) -> ValidationSet:
    """The fixed validation set of a run: images that share no base image with training, with fixed noise."""
    x_0, y = batch_tensors(open_stream(config, "validation").batch(0, config.evaluation_images), config.model)
    times = config.flow.validation_times(config.evaluation_times)
    return ValidationSet(x_0, y, times, seed=_seed(config.evaluation_seed, "validation noise"))


def save_weights(path: Path, model: DiT, flow: RectifiedFlow) -> None:
    """Write a model's weights as safetensors, with its configuration and its objective in the header."""
    import safetensors.torch

    from ditscale.dit.checkpoint import write_atomically

    tensors = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    content = {"version": ditscale.__version__, "config": model.config.to_dict(), "flow": dataclasses.asdict(flow)}
    # One entry: the order of several is left to chance, and equal weights should be equal files.
    header = {"ditscale": json.dumps(content)}
    write_atomically(path, safetensors.torch.save(tensors, metadata=header))


def load_weights(path: str | Path) -> tuple[DiT, RectifiedFlow]:
    """Build the model that :func:`save_weights` wrote, and the objective that it was trained with.

    Raises:
        InputError: no such file, or it is damaged or no weights of ours.
    """
    import safetensors

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            content = json.loads((file.metadata() or {})["ditscale"])
            config, flow = DiTConfig.from_dict(content["config"]), RectifiedFlow(**content["flow"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        model = DiT(config)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name != "pos_embed"]
        if missing or unexpected:
            raise KeyError(f"tensors {(missing + unexpected)[:3]} missing or unexpected")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected weights written by ditscale, got {error}") from error
    return model, flow


def open_stream(config: TrainConfig, split: Literal["train", "validation"]) -> ImageStream:
    """The images of a run: training images by its seed, or validation images by its evaluation seed.

    Raises:
        InputError: no such data, or it does not fit the model.
    """
    model = config.model
    if model.latent_factor != 1 or model.in_channels != 3:
        raise InputError(
            f"data: expected a model of RGB pixels (latent_factor 1, in_channels 3) for {config.data}, "
            f"got latent_factor {model.latent_factor}, in_channels {model.in_channels}"
        )
    seed = config.seed if split == "train" else config.evaluation_seed
    stream: ImageStream
    if config.data == "emoji_scenes":
        stream = EmojiScenes(split, model.image_size, seed)
    elif Path(config.data).is_dir():
        stream = ImageFolder(config.data, model.image_size, seed=seed, split=split)
    else:
        raise InputError(f"data: expected 'emoji_scenes' or a folder of images, got {config.data!r}")
    if model.condition == "caption" and model.vocabulary_size != len(stream.vocabulary):
        raise InputError(
            f"model.vocabulary_size: expected {len(stream.vocabulary)}, the words of {stream.name}, got {model.vocabulary_size}"
        )
    if model.condition == "class" and model.num_classes != len(stream.classes):
        raise InputError(
            f"model.num_classes: expected {len(stream.classes)}, the classes of {stream.name}, got {model.num_classes}"
        )
    return stream


def batch_tensors(batch: ImageBatch, model: DiTConfig) -> tuple[Tensor, Tensor | None]:
    """A batch as the model takes it: images [B, 3, S, S] float32 in [-1, 1], and words [B, K], labels [B] or None."""
    condition = {"none": None, "class": batch.labels, "caption": batch.tokens}[model.condition]
    if model.condition == "class" and (batch.labels < 0).any():
        raise InputError("model.condition: expected data in which every image has a class, got an image without one")
    return torch.from_numpy(to_float(batch.images)), None if condition is None else torch.from_numpy(condition)


class _Reader:
    """Reads a stream in larger pieces than a batch: an image costs the same in any piece, a call does not."""

    def __init__(self, stream: ImageStream, model: DiTConfig, batch: int) -> None:
        self.stream, self.model, self.batch = stream, model, batch
        self.steps = max(1, 64 // batch)
        self.piece = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        piece, place = divmod(step, self.steps)
        if piece != self.piece:
            count_ = self.steps * self.batch
            self.images, self.condition = batch_tensors(self.stream.batch(piece * count_, count_), self.model)
            self.piece = piece
        rows = slice(place * self.batch, (place + 1) * self.batch)
        return self.images[rows], None if self.condition is None else self.condition[rows]


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    return {"ditscale": ditscale.__version__, "torch": torch.__version__, "python": platform.python_version()}


def _seed(seed: int, purpose: str) -> int:
    """A 63-bit seed of its own for every purpose, so that streams of random numbers never overlap by accident."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
