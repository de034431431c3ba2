"""Emoji clips: scenes that move as their captions say, equal for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from ditscale.dit.data import EmojiClips, EmojiScenes, clip_vocabulary, emoji_vocabulary
from ditscale.errors import InputError

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def test_the_first_frame_is_the_scene_and_the_others_move_as_told():
    clips, scenes = EmojiClips("train", 32, 3, frames=4).batch(5, 40), EmojiScenes("train", 32, 3).batch(5, 40)
    assert clips.images.shape == (40, 3, 4, 32, 32) and clips.images.dtype == np.uint8
    assert np.array_equal(clips.images[:, :, 0], scenes.images) and np.array_equal(clips.labels, scenes.labels)
    seen = set()
    for clip, scene, caption, plain in zip(clips.images, scenes.images, clips.captions, scenes.captions, strict=True):
        motion, rest = caption.split(", ", 1)
        assert rest == plain
        seen.add(motion)
        ways = [WAYS[word] for word in motion.split() if word in WAYS]
        assert bool(ways) == (motion != "still")
        rows, columns = (2 * sum(axis) for axis in zip(*ways, strict=True)) if ways else (0, 0)
        # Pixel (i, j) of the scene is at (i + rows f, j + columns f) in frame f, around the edges.
        for frame in range(4):
            i, j = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
            assert np.array_equal(clip[:, frame, (i + rows * frame) % 32, (j + columns * frame) % 32], scene)
    assert len(seen) >= 8


def test_any_batch_gives_the_same_clips_and_the_hash_holds():
    clips = EmojiClips("validation", 16, 0, frames=3)
    whole, part = clips.batch(0, 30), clips.batch(11, 5)
    assert np.array_equal(whole.images[11:16], part.images) and whole.captions[11:16] == part.captions
    content = hashlib.sha256(whole.images.tobytes() + "\n".join(whole.captions).encode()).hexdigest()
    assert content == "1b0818b9b0b23ad6d07f9243c58147a217fba3a9e82862bae898506f75436735"


def test_words_and_identity():
    assert set(emoji_vocabulary().words) < set(clip_vocabulary().words)
    clips = EmojiClips(frames=2, caption_length=12)
    batch = clips.batch(0, 50)
    assert batch.tokens.shape == (50, 12) and not (batch.tokens == 1).any()
    others = [EmojiClips(frames=3, caption_length=12), EmojiScenes(caption_length=12), EmojiClips(seed=1, frames=2)]
    assert len({stream.sha256 for stream in (clips, *others)}) == 4 and clips.name == "emoji-clips/train"
    with pytest.raises(InputError, match="frames"):
        EmojiClips(frames=0)
