"""Captioned images as streams: embedded emoji scenes without end, folders, WebDataset shards, cached latents, data sets.

Needs numpy only, never torch (and `HubImages` the package ``datasets``). Every source is an `ImageStream`:
``stream.batch(start, count)`` gives the same images at the same indices for ever.
"""

from __future__ import annotations

from ditscale.dit.data.clips import EmojiClips, clip_vocabulary
from ditscale.dit.data.folder import ImageFolder
from ditscale.dit.data.hub import HubImages
from ditscale.dit.data.latents import LatentShards, write_latents
from ditscale.dit.data.pack import Emoji, EmojiPack, load_pack
from ditscale.dit.data.scenes import EmojiScenes, emoji_vocabulary
from ditscale.dit.data.sources import open_source
from ditscale.dit.data.stream import ImageBatch, ImageStream, to_float, to_uint8
from ditscale.dit.data.tars import ImageShards
from ditscale.dit.data.words import Vocabulary

__all__ = [
    "Emoji",
    "EmojiClips",
    "EmojiPack",
    "EmojiScenes",
    "HubImages",
    "ImageBatch",
    "ImageFolder",
    "ImageShards",
    "ImageStream",
    "LatentShards",
    "Vocabulary",
    "clip_vocabulary",
    "emoji_vocabulary",
    "load_pack",
    "open_source",
    "to_float",
    "to_uint8",
    "write_latents",
]
