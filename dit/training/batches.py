"""The inputs of every step: images and conditions from a stream, noise and times from the seed and the step's number."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.utils.data
from torch import Tensor

from ditscale.dit.condition import Condition, each
from ditscale.dit.config import DiTConfig
from ditscale.dit.data import ImageBatch, ImageStream, Vocabulary, to_float
from ditscale.dit.data.scenes import CAPTION_LENGTH
from ditscale.dit.data.sources import EMBEDDED, EMOJI_CLIPS, open_source
from ditscale.dit.flow import ValidationSet
from ditscale.dit.rundata import RunData
from ditscale.dit.seeds import seed_for
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.ranks import Ranks
from ditscale.errors import InputError


def open_stream(
    config: TrainConfig, split: Literal["train", "validation"], trained: RunData | None = None
) -> ImageStream:
    """The images of a run: training images by its seed, or validation images by its evaluation seed.

    ``trained``: what the run of a trained model knows of its data. The model fits its words, which :func:`batch_tensors`
    numbers captions by, not those that are in the data now. Default: None.

    Raises:
        InputError: no such data, or it does not fit the model, or has not the classes or scale of its training.
    """
    model = config.model
    if config.data in EMBEDDED and model.is_video != (config.data == EMOJI_CLIPS):
        raise InputError(f"data: expected {EMOJI_CLIPS} for videos, another for images, got {config.data!r}")
    worded = model.condition == "caption" and model.vocabulary_size > 0
    stream = open_source(
        config.data,
        split,
        size=model.image_size,
        width=model.image_width,
        frames=model.frames,
        seed=config.seed if split == "train" else config.evaluation_seed,
        caption_length=CAPTION_LENGTH
        if model.context == "pooled" or not model.caption_tokens
        else model.caption_tokens,
        words=model.vocabulary_size if worded else None,
        flip=config.flip and split == "train",
    )
    made = getattr(stream, "latent_factor", 1)
    if tuple(stream.shape) != model.input_shape or made not in (None, model.latent_factor):
        raise InputError(
            f"model: expected an input of shape {list(stream.shape)} and latent_factor {made}, as {stream.name} has, "
            f"got {list(model.input_shape)} and {model.latent_factor}"
        )
    if trained is not None:
        fields = ("classes", "mean", "std") if model.condition == "class" else ("mean", "std")
        trained.check(RunData.of(stream), "data", fields)
    words = len(stream.vocabulary if trained is None else trained.vocabulary)
    if worded and model.vocabulary_size != words:
        raise InputError(
            f"model.vocabulary_size: expected {'' if config.data in EMBEDDED else 'at most '}{words}, the words of "
            f"{stream.name}, got {model.vocabulary_size}"
        )
    if model.condition == "class" and model.num_classes != len(stream.classes):
        raise InputError(
            f"model.num_classes: expected {len(stream.classes)}, the classes of {stream.name}, got {model.num_classes}"
        )
    return stream


def batch_tensors(
    batch: ImageBatch, model: DiTConfig, vocabulary: Vocabulary | None = None
) -> tuple[Tensor, Condition]:
    """A batch as the model takes it: images [B, C, ...] float32, pixels in [-1, 1], and the condition.

    ``vocabulary`` numbers the captions' words. Default: the stream's own.

    Raises:
        InputError: an image lacks its class, or the data lack a text encoder's features of the model's widths.
    """
    if model.condition == "class" and (batch.labels < 0).any():
        raise InputError("model.condition: expected data in which every image has a class, got an image without one")
    return torch.from_numpy(to_float(batch.images)), _condition(batch, model, vocabulary)


def _condition(batch: ImageBatch, model: DiTConfig, vocabulary: Vocabulary | None) -> Condition:
    if model.condition == "none":
        return None
    if model.condition == "class":
        return torch.from_numpy(batch.labels)
    if model.vocabulary_size:
        if vocabulary is None:
            return torch.from_numpy(batch.tokens)
        return torch.from_numpy(vocabulary.encode(batch.captions, batch.tokens.shape[1]))
    wanted: dict[str, tuple[int, ...]] = {"features": (model.caption_tokens, model.caption_width)}
    if model.pooled_width:
        wanted["pooled"] = (model.pooled_width,)
    found = []
    for name, shape in wanted.items():
        values = getattr(batch, name)
        if values is None or values.shape[1:] != shape:
            came = "none" if values is None else f"{list(values.shape[1:])}"
            raise InputError(
                f"data: expected a text encoder's {name} of shape {list(shape)} for each image, got {came}"
            )
        found.append(torch.from_numpy(values))
    return found[0] if len(found) == 1 else tuple(found)


class StepInputs(NamedTuple):
    """What one process needs for its share of one step.

    Attributes:
        x_0: images [n, C, S, S] float32.
        y: conditions as the model takes them, or None.
        eps: noise, the shape of x_0.
        t: times [n] float32.
        drop: [n] bool, the images that see no condition; None without conditions.
    """

    x_0: Tensor
    y: Condition
    eps: Tensor
    t: Tensor
    drop: Tensor | None

    def changed(self, change: Callable[[Tensor], Tensor]) -> StepInputs:
        """Inputs of changed tensors, such as some of their rows."""
        drop = None if self.drop is None else change(self.drop)
        return StepInputs(change(self.x_0), each(self.y, change), change(self.eps), change(self.t), drop)


class Feeder:
    """The inputs of any step: a function of the configuration and the step's number, on any number of ranks.

    Each rank draws the noise and the times of the whole batch and takes its rows, so that they do not depend on how
    many ranks there are; it reads the images of its rows only.

    Args:
        config: what is trained.
        stream: its images.
        ranks: who takes which rows. Default: all are this process's.
        workers: processes that prepare images ahead. Default: 0.
        first_step: where to begin, for the workers. Default: 0.
    """

    def __init__(
        self, config: TrainConfig, stream: ImageStream, ranks: Ranks, *, workers: int = 0, first_step: int = 0
    ) -> None:
        self.config, self.ranks = config, ranks
        self._pieces = _Pieces(stream, config.model, config.batch, ranks.rows(config.batch))
        self._held = -1
        self._content: tuple[Tensor, Condition] = (torch.empty(0), None)
        ahead = range(first_step // self._pieces.steps, -(-config.steps // self._pieces.steps))
        self._ahead = iter(_loader(self._pieces, ahead, workers)) if workers else None
        self._pinned = ranks.device.type == "cuda"

    def __call__(self, step: int) -> StepInputs:
        """The inputs of step ``step``; with workers, the steps must be asked for in order."""
        config = self.config
        x_0, y = self._images(step)
        generator = torch.Generator().manual_seed(seed_for(config.seed, f"step {step}"))
        rows = self.ranks.rows(config.batch)
        eps = torch.randn((config.batch, *x_0.shape[1:]), generator=generator)[rows]
        t = config.flow.sample_times(config.batch, generator)[rows]
        drop = None
        if y is not None:
            drop = (torch.rand(config.batch, generator=generator) < config.condition_dropout)[rows]
        return StepInputs(x_0, y, eps, t, drop).changed(self._move)

    def _images(self, step: int) -> tuple[Tensor, Condition]:
        piece, place = divmod(step, self._pieces.steps)
        if piece != self._held:
            content = self._pieces[piece] if self._ahead is None else next(self._ahead)
            if isinstance(content, InputError):
                raise content
            self._content, self._held = content, piece
        rows = slice(place * self._pieces.share, (place + 1) * self._pieces.share)
        images, condition = self._content
        return images[rows], each(condition, lambda tensor: tensor[rows])

    def close(self) -> None:
        """End the workers. Left to the collector of cycles they would not hear of it, and be waited for, five seconds each."""
        self._ahead = None

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.ranks.device, non_blocking=True) if self._pinned else tensor


class _Pieces(torch.utils.data.Dataset["tuple[Tensor, Condition] | InputError"]):
    """Images and conditions of one rank's rows of ``steps`` steps after each other, or what is wrong with them.

    The error is a value, as the loader puts its worker's whole traceback into the message of one that is raised there.
    """

    def __init__(self, stream: ImageStream, model: DiTConfig, batch: int, rows: slice) -> None:
        self.stream, self.model, self.batch, self.first = stream, model, batch, rows.start
        self.share = rows.stop - rows.start
        # An image costs the same in any piece, a call does not: a single process, or a worker, reads several small steps
        # at once. The rows of one rank among others do not lie together.
        self.steps = max(1, 64 // batch) if self.share == batch else 1

    def __getitem__(self, piece: int) -> tuple[Tensor, Condition] | InputError:
        start = piece * self.steps * self.batch + self.first
        try:
            return batch_tensors(self.stream.batch(start, self.steps * self.share), self.model)
        except InputError as error:
            return error


def _loader(
    pieces: _Pieces, wanted: range, workers: int
) -> torch.utils.data.DataLoader[tuple[Tensor, Condition] | InputError]:
    """Pieces in order, prepared by processes. What a stream gives follows from its seed and the index, so it does not
    matter which process asks."""
    return torch.utils.data.DataLoader(
        pieces,
        sampler=wanted,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="spawn",
        worker_init_fn=_leave_group,
    )


def _leave_group(worker: int) -> None:
    """Ctrl-C, and torchrun's SIGTERM, are sent to the whole group. The training process decides when to stop, and a worker
    that is gone by then would cost it its checkpoint."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def validation_set(config: TrainConfig, trained: RunData | None = None) -> ValidationSet:
    """The fixed validation set of a run: images that share no base image with training, with fixed noise.

    ``trained``: what the run of a trained model knows of its data. Default: None.

    Raises:
        InputError: the data do not fit, or an image cannot be read or lacks its condition.
    """
    batch = open_stream(config, "validation", trained).batch(0, config.evaluation_images)
    x_0, y = batch_tensors(batch, config.model, None if trained is None else trained.vocabulary)
    times = config.flow.validation_times(config.evaluation_times)
    return ValidationSet(x_0, y, times, seed=seed_for(config.evaluation_seed, "validation noise"))
