"""From what a configuration calls its data to a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ditscale.dit.data.clips import EmojiClips
from ditscale.dit.data.folder import ImageFolder
from ditscale.dit.data.hub import HubImages
from ditscale.dit.data.latents import LatentShards
from ditscale.dit.data.scenes import EmojiScenes
from ditscale.dit.data.stream import ImageStream
from ditscale.dit.data.tars import ImageShards
from ditscale.errors import InputError

EMOJI_SCENES, EMOJI_CLIPS = EMBEDDED = "emoji_scenes", "emoji_clips"


def open_source(
    data: str,
    split: Literal["train", "validation"],
    *,
    size: int,
    width: int | None = None,
    frames: int = 1,
    seed: int,
    caption_length: int,
    words: int | None = None,
    flip: bool = False,
) -> ImageStream:
    """A stream of the data that a path holds; what lies in the folder tells its kind.

    data: "emoji_scenes" or "emoji_clips"; or a folder: with ``*.tar`` files `ImageShards`, with ``*.safetensors`` files
        `LatentShards`, a data set that Hugging Face ``datasets`` saved `HubImages`, else `ImageFolder`.
    split, seed, caption_length, flip: as the streams have them.
    size, width: of pictures in pixels, height and width; latents have their own, embedded pictures are square. Default of
        width: size.
    frames: of emoji clips.
    words: size of the vocabulary; None for one of all words.

    Raises InputError: no such data.
    """
    if data in EMBEDDED:
        if flip:
            raise InputError(f"flip: expected false for {data}, which are mirrored as they are made, got true")
        if data == EMOJI_CLIPS:
            return EmojiClips(split, size, seed, frames=frames, caption_length=caption_length)
        return EmojiScenes(split, size, seed, caption_length=caption_length)
    path = Path(data)
    if not path.is_dir():
        raise InputError(f"data: expected {', '.join(EMBEDDED)} or a folder, got {data!r}")
    if any(path.glob("*.safetensors")):
        return LatentShards(path, seed=seed, split=split, caption_length=caption_length, words=words, flip=flip)
    kind = ImageFolder
    if any(path.glob("*.tar")):
        kind = ImageShards  # type: ignore[assignment]
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        kind = HubImages  # type: ignore[assignment]
    return kind(path, size, width=width, seed=seed, split=split, caption_length=caption_length, words=words, flip=flip)
