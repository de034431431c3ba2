"""Emoji scenes: the same at every index whatever is asked, and drawn as the caption says."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from ditscale.dit.data import EmojiScenes, load_pack, to_float, to_uint8
from ditscale.dit.data import scenes as module
from ditscale.dit.data.scenes import COLOURS, SIZES
from ditscale.errors import InputError


def test_batch_boundaries_do_not_matter() -> None:
    """Single images and odd pieces, backwards, of another object; 150 images cross the chunks of 64."""
    whole = EmojiScenes().batch(0, 150)
    stream = EmojiScenes()
    for start, count in ((140, 10), (63, 2), (0, 1), (37, 90), (149, 1)):
        piece = stream.batch(start, count)
        assert np.array_equal(piece.images, whole.images[start : start + count])
        assert np.array_equal(piece.tokens, whole.tokens[start : start + count])
        assert np.array_equal(piece.labels, whole.labels[start : start + count])
        assert piece.captions == whole.captions[start : start + count]


def test_scenes_are_equal_on_every_machine() -> None:
    """Recorded once. A change here is a change of every published run: raise `scenes.VERSION` with it."""
    digest = hashlib.sha256()
    for split, size in itertools.product(("train", "validation"), SIZES):
        batch = EmojiScenes(split, size, seed=3).batch(1000, 40)  # type: ignore[arg-type]
        digest.update(batch.images.tobytes() + repr(batch.captions).encode() + batch.tokens.tobytes())
    assert digest.hexdigest() == "ce023cf8487b11c62ac66ac6830a1aeda1d2ad72cb8e7a4beb0036a2e197b214"


def test_far_index_works() -> None:
    assert EmojiScenes().batch(2**62, 2).images.shape == (2, 3, 32, 32)


def test_empty_batch() -> None:
    batch = EmojiScenes().batch(5, 0)
    assert len(batch) == 0 and batch.images.shape == (0, 3, 32, 32) and batch.tokens.shape == (0, 40)


def test_no_two_scenes_are_equal() -> None:
    images = EmojiScenes().batch(0, 4000).images.reshape(4000, -1)
    assert len(np.unique(images, axis=0)) == 4000


def test_seed_and_split_change_the_scenes() -> None:
    streams = [EmojiScenes(seed=0), EmojiScenes(seed=1), EmojiScenes("validation"), EmojiScenes(size=24)]
    assert len({stream.sha256 for stream in streams}) == 4
    assert EmojiScenes(seed=0).sha256 == streams[0].sha256
    captions = [stream.batch(0, 50).captions for stream in streams[:3]]
    assert captions[0] != captions[1] and captions[0] != captions[2]


@pytest.mark.parametrize("size", SIZES)
def test_values_and_shapes(size: int) -> None:
    batch = EmojiScenes(size=size).batch(0, 200)
    assert batch.images.shape == (200, 3, size, size) and batch.images.dtype == np.uint8
    assert batch.images.flags.c_contiguous
    assert batch.tokens.shape == (200, 40) and batch.tokens.dtype == np.int64
    assert batch.labels.min() >= 0 and batch.labels.max() < len(EmojiScenes.classes)


def test_sizes_show_the_same_scene() -> None:
    """Averaged over 2x2 pixels, the 64 px scene is near the 32 px scene; a misplaced emoji would not be."""
    small, large = (EmojiScenes(size=size).batch(0, 200) for size in (32, 64))
    assert small.captions == large.captions
    shrunk = large.images.reshape(200, 3, 32, 2, 32, 2).mean(axis=(3, 5))
    assert np.abs(shrunk - small.images).mean(axis=(1, 2, 3)).max() < 6
    assert np.abs(np.roll(shrunk, 1, axis=3) - small.images).mean() > 2 * np.abs(shrunk - small.images).mean()


def test_float_conversion_is_inverse() -> None:
    every = np.arange(256, dtype=np.uint8)
    floats = to_float(every)
    assert floats.dtype == np.float32 and floats[0] == -1 and floats[-1] == 1
    assert np.array_equal(to_uint8(floats), every)
    assert to_uint8(np.array([-3.0, 3.0])).tolist() == [0, 255]


def test_drawn_emoji_are_those_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watches the renderer: the caption names every pasted picture, in a place that makes it true."""
    pack = load_pack()
    pictures: dict[bytes, list[tuple[str, str]]] = {}  # some flags are one picture with several names
    for emoji in pack.emoji:
        for j in range(len(emoji.tones)):
            sprite = pack.sprites[emoji.first + j]
            for seen in (sprite, sprite[..., ::-1])[: 1 + emoji.flip]:  # a mirrored "6" would not be found
                names = (emoji.phrase(j), emoji.phrase(j, kind=True))
                pictures.setdefault(np.ascontiguousarray(seen).tobytes(), []).append(names)
    drawn: list[list[tuple[list[tuple[str, str]], int, int, int]]] = [[] for _ in range(400)]
    paste = module.paste

    def watch(canvas, target, sprites, extent, x, y):  # type: ignore[no-untyped-def]
        for i, scene in enumerate(target.tolist()):
            names = pictures[np.ascontiguousarray(sprites[i]).tobytes()]
            drawn[scene].append((names, int(x[i]), int(y[i]), int(extent[i])))
        paste(canvas, target, sprites, extent, x, y)

    monkeypatch.setattr(module, "paste", watch)
    captions = EmojiScenes().batch(0, 400).captions
    relations = {"left of": 0, "right of": 0, "above": 0, "below": 0, "left to right": 0, "top to bottom": 0}
    for caption, slots in zip(captions, drawn, strict=True):
        text = caption
        found = [
            max((said for pair in names for said in pair if said in caption), key=len, default=None)
            for names, *_ in slots
        ]
        assert None not in found, (caption, slots)
        for slot in sorted(range(len(slots)), key=lambda s: -len(found[s] or "")):  # "a dog" is in "a dog face"
            text = text.replace(found[slot] or "", f"#{slot}", 1)
        centre = {
            f"#{slot}": (x + extent / 2, y + extent / 2, x, y, extent) for slot, (_, x, y, extent) in enumerate(slots)
        }
        scene, ground = text.rsplit(" on ", 1)
        assert ground in COLOURS or ground.split()[1] in COLOURS and ground.split()[3] in COLOURS
        if len(slots) == 1:
            assert scene == "#0"
        elif scene.endswith("from left to right"):
            assert centre["#0"][0] < centre["#1"][0] < centre["#2"][0]
            relations["left to right"] += 1
        elif scene.endswith("from top to bottom"):
            assert centre["#0"][1] < centre["#1"][1] < centre["#2"][1]
            relations["top to bottom"] += 1
        else:
            word = next(word for word in relations if f" {word} " in scene)
            first, second = (side.split(" and ") for side in scene.split(f" {word} "))
            axis = 0 if word in ("left of", "right of") else 1
            sign = 1 if word in ("left of", "above") else -1
            for a, b in itertools.product(first, second):
                assert sign * (centre[b][axis] - centre[a][axis]) > 0, caption
            relations[word] += 1
        for a, b in itertools.combinations(centre.values(), 2):  # nothing hides behind something else
            assert a[2] + a[4] <= b[2] or b[2] + b[4] <= a[2] or a[3] + a[4] <= b[3] or b[3] + b[4] <= a[3]
    assert min(relations.values()) > 5
    assert {len(slots) for slots in drawn} == {1, 2, 3}


def test_background_is_the_colour_named() -> None:
    """The most frequent colour of a flat scene is its ground."""
    batch = EmojiScenes().batch(0, 300)
    flat = [i for i, caption in enumerate(batch.captions) if caption.rsplit(" on ", 1)[1] in COLOURS]
    assert 100 < len(flat) < 200
    wrong = 0
    for i in flat:
        colours, counts = np.unique(batch.images[i].reshape(3, -1).T, axis=0, return_counts=True)
        ground = colours[counts.argmax()].astype(int)
        named = np.array(COLOURS[batch.captions[i].rsplit(" on ", 1)[1]])
        wrong += int(np.abs(ground - named).max() > 10)
    assert wrong <= 3  # a large square emoji of one colour may outnumber the ground


def test_gradient_has_the_colours_named() -> None:
    """Both ends lie on the border, where an emoji can hide one now and then but not often."""
    batch = EmojiScenes().batch(0, 300)
    missing = {"first": 0, "second": 0}
    scenes = [(i, c.split()) for i, c in enumerate(batch.captions) if c.endswith("gradient")]
    for i, words in scenes:
        image = batch.images[i].astype(int)
        border = np.concatenate([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], axis=1).T
        assert words[-4] != words[-2]
        for end, name in (("first", words[-4]), ("second", words[-2])):
            missing[end] += int(np.abs(border - COLOURS[name]).max(axis=1).min() > 14)
    assert len(scenes) > 100 and max(missing.values()) < 0.05 * len(scenes)


def test_splits_draw_their_own_emoji() -> None:
    pack = load_pack()
    train, held = EmojiScenes(), EmojiScenes("validation")
    assert set(train.emoji) | set(held.emoji) == set(pack.emoji) and not set(train.emoji) & set(held.emoji)


def test_unknown_share_of_validation_words_is_small() -> None:
    tokens = EmojiScenes("validation").batch(0, 3000).tokens
    assert (tokens == 1).sum() / (tokens > 0).sum() < 0.01
    assert not (EmojiScenes().batch(0, 3000).tokens == 1).any()


def test_captions_fit_their_tokens() -> None:
    """At 40 tokens one caption in 100,000 is cut."""
    stream = EmojiScenes()
    batch = stream.batch(0, 2000)
    assert stream.vocabulary.decode(batch.tokens) == batch.captions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split: expected 'train' or 'validation', got 'test'"),
        ({"size": 33}, "size: expected one of 16, 24, 32, 48, 64, got 33"),
        ({"caption_length": 0}, "caption_length: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EmojiScenes(**arguments)  # type: ignore[arg-type]


def test_negative_index() -> None:
    with pytest.raises(InputError, match="start, count: expected non-negative"):
        EmojiScenes().batch(-1, 4)
