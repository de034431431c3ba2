"""Emoji scenes: an endless stream of captioned pictures, each a function of (split, seed, index)."""

from __future__ import annotations

import functools
import hashlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.draws import Draws
from ditscale.dit.data.pack import CATEGORIES, Emoji, Split, load_pack
from ditscale.dit.data.render import EXTENTS, UNITS, backgrounds, paste
from ditscale.dit.data.stream import ImageBatch
from ditscale.dit.data.words import Vocabulary, split_words
from ditscale.errors import InputError

SIZES: Final = (16, 24, 32, 48, 64)
CAPTION_LENGTH: Final = 40
# Part of every stream's identity: raise it with any change to what an index looks like or says.
VERSION: Final = 1
COLOURS: Final = {
    "red": (222, 70, 74), "orange": (246, 146, 66), "yellow": (250, 210, 92), "lime": (172, 212, 90),
    "green": (70, 166, 98), "teal": (44, 158, 154), "cyan": (112, 208, 226), "blue": (64, 120, 222),
    "navy": (36, 54, 106), "purple": (136, 92, 202), "magenta": (204, 68, 148), "pink": (242, 148, 184),
    "brown": (132, 94, 68), "beige": (234, 220, 194), "gray": (148, 154, 162), "white": (244, 245, 248),
    "black": (32, 34, 40),
}  # fmt: skip
_JITTER: Final = 10
# How the emoji of a scene stand: name -> (how many, share of all scenes in twentieths).
_LAYOUTS: Final = {
    "one": (1, 8), "beside": (2, 4), "above": (2, 4), "row": (3, 1), "column": (3, 1),
    "one above two": (3, 1), "two above one": (3, 1),
}  # fmt: skip
_NAMES: Final = tuple(_LAYOUTS)
_SLOTS: Final = np.array([slots for slots, _ in _LAYOUTS.values()])
_LOTTERY: Final = np.repeat(np.arange(len(_LAYOUTS)), [share for _, share in _LAYOUTS.values()])
# Least width of an emoji in units when one, two or three share the scene.
_LEAST: Final = np.array([0, 64, 40, EXTENTS[0]])
_DIRECTIONS: Final = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)])
_PALETTE: Final = np.array(list(COLOURS.values()))
_DECISIONS: Final = 32
_STRUCTURE: Final = (
    *("a", "an", "the", ",", "(", ")", "with", "and", "on", "to", "gradient", "left", "right", "of"),
    *("above", "below", "from", "top", "bottom", "light", "medium", "dark", "skin"),
)


@functools.lru_cache(maxsize=1)
def emoji_vocabulary() -> Vocabulary:
    """The words of every caption that a training scene can have; the same for both splits."""
    words = {*_STRUCTURE, *COLOURS}
    for emoji in load_pack().split("train"):
        words.update(split_words(emoji.name), split_words(emoji.kind))
    return Vocabulary(sorted(words))


def _boxes(layout: NDArray[np.int64], band: NDArray[np.int64], cut: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n, 3, 4]: left, top, right, bottom of the box that each slot's emoji keeps to, in units.

    Boxes of one scene never overlap.
    band: 0..56, where the strip that the emoji share begins across their axis.
    cut: 52..76, where one box ends and the next begins.
    """
    zero, full = np.zeros_like(band), np.full_like(band, UNITS)
    half = np.full_like(band, UNITS // 2)
    whole = [zero, zero, full, full]
    beside = [[zero, band, cut, band + 72], [cut, band, full, band + 72], whole]
    row = [[zero + left, band, zero + left + 42, band + 72] for left in (0, 43, 86)]
    fork = [[band, zero, band + 72, cut], [zero, cut, half, full], [half, cut, full, full]]
    cone = [[zero, zero, half, cut], [half, zero, full, cut], [band, cut, band + 72, full]]
    above, column = ([[box[side] for side in (1, 0, 3, 2)] for box in boxes] for boxes in (beside, row))
    tables = {
        "one": [whole] * 3, "beside": beside, "above": above, "row": row, "column": column,
        "one above two": fork, "two above one": cone,
    }  # fmt: skip
    return np.array([tables[name] for name in _NAMES])[layout, :, :, np.arange(len(layout))]


def _caption(layout: int, phrases: list[str], reverse: bool, ground: str) -> str:
    """What a scene says; `reverse` tells the relation of a pair from the other end."""
    name = _NAMES[layout]
    a, b, c = phrases
    if name == "one":
        text = a
    elif name == "beside":
        text = f"{b} right of {a}" if reverse else f"{a} left of {b}"
    elif name == "above":
        text = f"{b} below {a}" if reverse else f"{a} above {b}"
    elif name == "row":
        text = f"{a}, {b} and {c} from left to right"
    elif name == "column":
        text = f"{a}, {b} and {c} from top to bottom"
    elif name == "one above two":
        text = f"{a} above {b} and {c}"
    else:
        text = f"{a} and {b} above {c}"
    return f"{text} on {ground}"


class EmojiScenes:
    """Endless captioned scenes: one to three emoji on a flat or gradient background.

    split: "train" or "validation"; the validation split draws its emoji from about 5 % that no training scene
        shows, variants and look-alikes included (see `pack.Emoji.group`); backgrounds and layouts are drawn
        alike.
    size: pixels, one of 16, 24, 32, 48, 64. The art is 32 px and every emoji is resampled from it to its
        place (cubic, premultiplied alpha, sub-pixel), so scenes of 48 and 64 px are softer than art drawn at
        that size.
    seed: another seed is another stream.
    caption_length: tokens a caption; longer ones are cut.

    The image at an index is equal to the bit on every machine, in any batch, at any time.
    """

    unique_images: Final[int | None] = None
    classes: Final = CATEGORIES

    def __init__(
        self, split: Split = "train", size: int = 32, seed: int = 0, *, caption_length: int = CAPTION_LENGTH
    ) -> None:
        if split not in ("train", "validation"):
            raise InputError(f"split: expected 'train' or 'validation', got {split!r}")
        if size not in SIZES:
            raise InputError(f"size: expected one of {', '.join(map(str, SIZES))}, got {size}")
        if caption_length < 1:
            raise InputError(f"caption_length: expected at least 1, got {caption_length}")
        self.split: Split = split
        self.size = size
        self.seed = seed
        self.caption_length = caption_length
        self.vocabulary = emoji_vocabulary()
        self.emoji: tuple[Emoji, ...] = load_pack().split(split)
        self._sprites = load_pack().sprites
        self._first = np.array([emoji.first for emoji in self.emoji])
        self._pictures = np.array([len(emoji.tones) for emoji in self.emoji])
        self._flip = np.array([emoji.flip for emoji in self.emoji])
        self._label = np.array([CATEGORIES.index(emoji.category) for emoji in self.emoji])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        return (3, self.size, self.size)

    @property
    def name(self) -> str:
        """``emoji-scenes/train`` or ``emoji-scenes/validation``."""
        return f"emoji-scenes/{self.split}"

    @property
    def sha256(self) -> str:
        """Identity of images and captions: pack, renderer version, split, size, seed and vocabulary."""
        parts = (
            load_pack().sha256,
            VERSION,
            self.split,
            self.size,
            self.seed,
            self.caption_length,
            self.vocabulary.sha256,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def batch(self, start: int, count: int) -> ImageBatch:
        """Scenes `start` to ``start + count - 1``. Raises InputError for a negative start or count."""
        if start < 0 or count < 0:
            raise InputError(f"start, count: expected non-negative integers, got {start} and {count}")
        draws = Draws(f"emoji scenes {VERSION} {self.split} {self.seed}", np.arange(start, start + count), _DECISIONS)
        layout = _LOTTERY[draws.below(len(_LOTTERY))]
        which, picture = self._choose(draws)
        canvas, grounds = self._background(draws)
        self._draw(draws, canvas, layout, which, picture)
        style = draws.below(4)
        kinds = (style % 2 == 1).tolist()
        phrases = [
            [self.emoji[e].phrase(p, kind=kind) for e, p in zip(chosen, pictures, strict=True)]
            for chosen, pictures, kind in zip(which.tolist(), picture.tolist(), kinds, strict=True)
        ]
        captions = list(map(_caption, layout.tolist(), phrases, (style > 1).tolist(), grounds))
        return ImageBatch(
            images=np.ascontiguousarray(np.rint(canvas).astype(np.uint8).transpose(0, 2, 1, 3)),
            captions=captions,
            tokens=self.vocabulary.encode(captions, self.caption_length),
            labels=self._label[which[:, 0]],
        )

    def _background(self, draws: Draws) -> tuple[NDArray[np.float32], list[str]]:
        """Canvases [n, size, 3, size], half of them flat and half gradients, and what captions call them."""
        colour = draws.below(len(_PALETTE))
        other = (colour + 1 + draws.below(len(_PALETTE) - 1)) % len(_PALETTE)
        gradient = draws.below(2) == 1
        shades = [
            _PALETTE[c] + np.stack([draws.between(-_JITTER, _JITTER) for _ in range(3)], axis=1)
            for c in (colour, other)
        ]
        near, far = (np.clip(shade, 0, 255) for shade in shades)
        canvas = backgrounds(
            near,
            np.where(gradient[:, None], far, near),
            _DIRECTIONS[draws.below(len(_DIRECTIONS))],
            self.size,
        )
        names = list(COLOURS)
        grounds = [
            f"a {names[a]} to {names[b]} gradient" if mixed else names[a]
            for a, b, mixed in zip(colour.tolist(), other.tolist(), gradient.tolist(), strict=True)
        ]
        # "an orange to red gradient"
        return canvas, [ground.replace("a orange", "an orange") for ground in grounds]

    def _draw(
        self,
        draws: Draws,
        canvas: NDArray[np.float32],
        layout: NDArray[np.int64],
        which: NDArray[np.int64],
        picture: NDArray[np.int64],
    ) -> None:
        """Paste the emoji of every slot that a layout has, each somewhere in its box at some size."""
        slots = _SLOTS[layout]
        boxes = _boxes(layout, draws.below(57), 52 + draws.below(25))
        step = EXTENTS[1] - EXTENTS[0]
        for slot in range(3):
            left, top, right, bottom = boxes[:, slot].T
            room = np.minimum(np.minimum(right - left, bottom - top), EXTENTS[-1])
            extent = _LEAST[slots] + step * draws.below((room - _LEAST[slots]) // step + 1)
            x, y = left + draws.below(right - left - extent + 1), top + draws.below(bottom - top - extent + 1)
            flip = (draws.below(2) == 1) & self._flip[which[:, slot]]
            rows = np.flatnonzero(slots > slot)
            sprites = self._sprites[self._first[which[rows, slot]] + picture[rows, slot]]
            sprites[flip[rows]] = sprites[flip[rows], :, :, ::-1]
            paste(canvas, rows, sprites, extent[rows], x[rows], y[rows])

    def _choose(self, draws: Draws) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Three different emoji a scene and the picture (skin tone) of each: int64 [n, 3] twice."""
        total = len(self.emoji)
        first = draws.below(total)
        second = (first + 1 + draws.below(total - 1)) % total
        third = draws.below(total - 2)
        third += third >= np.minimum(first, second)
        third += third >= np.maximum(first, second)
        which = np.stack([first, second, third], axis=1)
        return which, np.stack([draws.below(self._pictures[which[:, slot]]) for slot in range(3)], axis=1)
