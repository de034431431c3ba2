"""What every image source offers to a trainer, and the two conversions between bytes and floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.words import Vocabulary


@dataclass(frozen=True)
class ImageBatch:
    """`n` consecutive samples of a stream.

    images: uint8 [n, 3, size, size], of clips [n, 3, frames, size, size], sRGB, of which `to_float` makes the float32 in
        [-1, 1] that models take; or latents, float32 [n, *shape], as models take them.
    captions: n strings.
    tokens: int64 [n, L], the captions in the stream's vocabulary; 0 pads, 1 is an unknown word.
    labels: int64 [n], index into the stream's `classes`; -1 where an image has no class.
    features: float32 [n, S, W] of a text encoder, rows of zeros behind a caption's end; None where there are none.
    pooled: float32 [n, V], its pooled vectors; None where there are none.
    """

    images: NDArray[np.uint8] | NDArray[np.float32]
    captions: list[str]
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    features: NDArray[np.float32] | None = None
    pooled: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.images)


class ImageStream(Protocol):
    """An endless, replayable sequence of captioned images: what stands at an index never changes."""

    @property
    def name(self) -> str:
        """What a run record calls this data, such as ``"emoji-scenes/train"``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample: (3, size, size) for pictures, (C, h, w) for latents."""

    @property
    def sha256(self) -> str:
        """Identity: two streams with the same string give the same images and captions at every index."""

    @property
    def unique_images(self) -> int | None:
        """How many different images there are before the first repetition; None when there is no end."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The words that tokens stand for."""

    def batch(self, start: int, count: int) -> ImageBatch:
        """Images ``start`` to ``start + count - 1``."""


def to_float(images: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """uint8 images as float32 in [-1, 1]: 0 becomes -1 and 255 becomes 1. Any shape. Latents are float32 and stay as they are."""
    if images.dtype == np.float32:
        return np.asarray(images, np.float32)
    scaled: NDArray[np.float32] = images.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return scaled


def to_uint8(images: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Inverse of `to_float`, rounded to the nearest byte; values outside [-1, 1] are clipped. Any shape."""
    bytes_: NDArray[np.uint8] = np.rint(np.clip((images + 1) * 127.5, 0, 255)).astype(np.uint8)
    return bytes_
