"""The inputs of every step: images and conditions from a stream, noise and times from the seed and the step's number."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ditscale.dit.config import DiTConfig
from ditscale.dit.data import EmojiScenes, ImageBatch, ImageFolder, ImageStream, to_float
from ditscale.dit.flow import ValidationSet
from ditscale.dit.training.config import TrainConfig
from ditscale.errors import InputError


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


class Reader:
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


def validation_set(config: TrainConfig) -> ValidationSet:
    """The fixed validation set of a run: images that share no base image with training, with fixed noise."""
    x_0, y = batch_tensors(open_stream(config, "validation").batch(0, config.evaluation_images), config.model)
    times = config.flow.validation_times(config.evaluation_times)
    return ValidationSet(x_0, y, times, seed=seed_for(config.evaluation_seed, "validation noise"))


def seed_for(seed: int, purpose: str) -> int:
    """A 63-bit seed of its own for every purpose, so that streams of random numbers never overlap by accident."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
