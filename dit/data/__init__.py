"""Real, captioned images without a download: embedded emoji, endless scenes made of them, and image folders.

Needs numpy only, never torch. Every source is an `ImageStream`: ``stream.batch(start, count)`` gives the same
images at the same indices for ever.
"""

from __future__ import annotations

from ditscale.dit.data.clips import EmojiClips, clip_vocabulary
from ditscale.dit.data.folder import ImageFolder
from ditscale.dit.data.pack import Emoji, EmojiPack, load_pack
from ditscale.dit.data.scenes import EmojiScenes, emoji_vocabulary
from ditscale.dit.data.stream import ImageBatch, ImageStream, to_float, to_uint8
from ditscale.dit.data.words import Vocabulary

__all__ = [
    "Emoji",
    "EmojiClips",
    "EmojiPack",
    "EmojiScenes",
    "ImageBatch",
    "ImageFolder",
    "ImageStream",
    "Vocabulary",
    "clip_vocabulary",
    "emoji_vocabulary",
    "load_pack",
    "to_float",
    "to_uint8",
]
