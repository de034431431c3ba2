"""Emoji clips: short videos of an emoji scene that moves, each a function of (split, seed, index, frames)."""

from __future__ import annotations

import functools
import hashlib
from typing import Final

import numpy as np

from ditscale.dit.data.draws import Draws
from ditscale.dit.data.pack import Split
from ditscale.dit.data.scenes import CAPTION_LENGTH, EmojiScenes, emoji_vocabulary
from ditscale.dit.data.stream import ImageBatch
from ditscale.dit.data.words import Vocabulary
from ditscale.errors import InputError

# Part of every stream's identity: raise it with any change to what an index looks like or says.
VERSION: Final = 1
# How a scene moves: what the caption says, and (rows, columns) in sixteenths of the picture a frame.
_MOTIONS: Final = (
    ("still", (0, 0)), ("moving left", (0, -1)), ("moving right", (0, 1)), ("moving up", (-1, 0)), ("moving down", (1, 0)),
    ("moving left and up", (-1, -1)), ("moving right and up", (-1, 1)), ("moving left and down", (1, -1)),
    ("moving right and down", (1, 1)),
)  # fmt: skip


@functools.lru_cache(maxsize=1)
def clip_vocabulary() -> Vocabulary:
    """The words of the scenes' captions and those of the motions."""
    return Vocabulary(sorted({*emoji_vocabulary().words[2:], *" ".join(name for name, _ in _MOTIONS).split()}))


class EmojiClips(EmojiScenes):
    """Endless captioned clips: a scene of :class:`EmojiScenes` that moves by a sixteenth of its side a frame, or not at all.

    What leaves at one side comes in at the other. The caption says how before what: "moving left and up, a red apple on blue".

    frames: pictures of a clip.
    split, size, seed, caption_length: as in :class:`EmojiScenes`; index i shows the scene of index i there.

    Images of a batch are uint8 [n, 3, frames, size, size].
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 32,
        seed: int = 0,
        *,
        frames: int,
        caption_length: int = CAPTION_LENGTH,
    ) -> None:
        if frames < 1:
            raise InputError(f"frames: expected at least 1, got {frames}")
        super().__init__(split, size, seed, caption_length=caption_length)
        self.frames = frames
        self.vocabulary = clip_vocabulary()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (3, self.frames, self.size, self.size)

    @property
    def name(self) -> str:
        """``emoji-clips/train`` or ``emoji-clips/validation``."""
        return f"emoji-clips/{self.split}"

    @property
    def sha256(self) -> str:
        """Identity of images and captions: that of the scenes, frames and version."""
        return hashlib.sha256(repr((super().sha256, self.frames, VERSION)).encode()).hexdigest()

    def batch(self, start: int, count: int) -> ImageBatch:
        """Clips `start` to ``start + count - 1``. Raises InputError for a negative start or count."""
        scenes = super().batch(start, count)
        draws = Draws(f"emoji clips {VERSION} {self.split} {self.seed}", np.arange(start, start + count), 1)
        motions = [_MOTIONS[i] for i in draws.below(len(_MOTIONS)).tolist()]
        step = self.size // 16
        images = np.empty((count, 3, self.frames, self.size, self.size), np.uint8)
        for image, clip, (_, (rows, columns)) in zip(scenes.images, images, motions, strict=True):
            for frame in range(self.frames):
                clip[:, frame] = np.roll(image, (rows * step * frame, columns * step * frame), axis=(1, 2))
        captions = [f"{name}, {caption}" for caption, (name, _) in zip(scenes.captions, motions, strict=True)]
        return ImageBatch(images, captions, self.vocabulary.encode(captions, self.caption_length), scenes.labels)
