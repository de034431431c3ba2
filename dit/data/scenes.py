"""Emoji scenes: an endless stream of captioned pictures, each a function of (split, seed, index) and nothing else."""

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
_JITTER = 10
# Where the emoji of a scene stand. The share of each is its share of this list; captions name the slots in order.
_LAYOUTS: Final = (*["one"] * 8, *["beside"] * 4, *["above"] * 4, "row", "column", "one above two", "two above one")
_SLOTS: Final = {"one": 1, "beside": 2, "above": 2, "row": 3, "column": 3, "one above two": 3, "two above one": 3}
_STRUCTURE: Final = (
    "a an the , ( ) with and on to gradient left right of above below from top bottom light medium dark skin".split()
)
_DIRECTIONS: Final = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)])
_COLUMNS: Final = 32


@functools.lru_cache(maxsize=1)
def emoji_vocabulary() -> Vocabulary:
    """The words of every caption that a training scene can have; the same for both splits."""
    words = {*_STRUCTURE, *COLOURS}
    for emoji in load_pack().split("train"):
        words.update(split_words(emoji.name), split_words(emoji.kind))
    return Vocabulary(sorted(words))


def _boxes(layout: NDArray[np.int64], band: NDArray[np.int64], cut: NDArray[np.int64]) -> NDArray[np.int64]:
    """int64 [n, 3, 4]: left, top, right, bottom of the box that each slot's emoji keeps to, in units; boxes never overlap.

    band: 0..56, where the strip that the emoji share begins across their axis; cut: 52..76, where one box ends and the next begins.
    """
    zero, full = np.zeros_like(band), np.full_like(band, UNITS)
    half = np.full_like(band, UNITS // 2)
    whole = [zero, zero, full, full]
    beside = [[zero, band, cut, band + 72], [cut, band, full, band + 72], whole]
    row = [[zero + left, band, zero + left + 42, band + 72] for left in (0, 43, 86)]
    fork = [[band, zero, band + 72, cut], [zero, cut, half, full], [half, cut, full, full]]
    cone = [[zero, zero, half, cut], [half, zero, full, cut], [band, cut, band + 72, full]]
    kinds = {"one": [whole] * 3, "beside": beside, "row": row, "one above two": fork, "two above one": cone}
    tables = {kind: np.array(table).transpose(2, 0, 1) for kind, table in kinds.items()}
    tables["above"], tables["column"] = (tables[kind][..., [1, 0, 3, 2]] for kind in ("beside", "row"))
    chosen = np.array([_LAYOUTS.index(kind) for kind in _SLOTS])
    return np.select([(layout == at)[:, None, None] for at in chosen], [tables[kind] for kind in _SLOTS])


class EmojiScenes:
    """Endless captioned scenes: one to three emoji on a flat or gradient background.

    split: "train" or "validation"; the validation split draws its emoji from about 5 % that no training scene shows, variants and
        look-alikes included (see `pack.Emoji.group`); backgrounds and layouts are drawn alike.
    size: pixels, one of 16, 24, 32, 48, 64. The art is 32 px and every emoji is resampled from it to its place (cubic,
        premultiplied alpha, sub-pixel), so scenes of 48 and 64 px are softer than art drawn at that size.
    seed: another seed is another stream.
    caption_length: tokens a caption; longer ones are cut.

    The image at an index is equal to the bit on every machine, in any batch, at any time.
    """

    unique_images = None
    classes = CATEGORIES

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
    def name(self) -> str:
        """``emoji-scenes/train`` or ``emoji-scenes/validation``."""
        return f"emoji-scenes/{self.split}"

    @property
    def sha256(self) -> str:
        """Identity of images and captions: pack, renderer version, split, size, seed and vocabulary."""
        parts = (load_pack().sha256, VERSION, self.split, self.size, self.seed, self.caption_length, self.vocabulary.sha256)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def batch(self, start: int, count: int) -> ImageBatch:
        """Scenes `start` to ``start + count - 1``. Raises InputError for a negative start or count."""
        if start < 0 or count < 0:
            raise InputError(f"start, count: expected non-negative integers, got {start} and {count}")
        draws = Draws(f"emoji scenes {VERSION} {self.split} {self.seed}", np.arange(start, start + count), _COLUMNS)
        layout = draws.below(len(_LAYOUTS))
        slots = np.array([_SLOTS[kind] for kind in _LAYOUTS])[layout]
        which, picture = self._choose(draws)
        palette = np.array(list(COLOURS.values()))
        colour = draws.below(len(palette))
        other = (colour + 1 + draws.below(len(palette) - 1)) % len(palette)
        gradient = draws.below(2) == 1
        jitter = [np.stack([draws.between(-_JITTER, _JITTER) for _ in range(3)], axis=1) for _ in range(2)]
        near = np.clip(palette[colour] + jitter[0], 0, 255)
        far = np.where(gradient[:, None], np.clip(palette[other] + jitter[1], 0, 255), near)
        canvas = backgrounds(near, far, _DIRECTIONS[draws.below(len(_DIRECTIONS))], self.size)

        boxes = _boxes(np.array([_LAYOUTS.index(kind) for kind in _LAYOUTS])[layout], draws.below(57), 52 + draws.below(25))
        for slot in range(3):
            left, top, right, bottom = boxes[:, slot].T
            room = np.minimum(np.minimum(right - left, bottom - top), EXTENTS[-1])
            least = np.where(slots == 1, 64, np.where(slots == 2, 40, EXTENTS[0]))
            step = EXTENTS[1] - EXTENTS[0]
            extent = least + step * draws.below((room - least) // step + 1)
            x, y = left + draws.below(right - left - extent + 1), top + draws.below(bottom - top - extent + 1)
            flip = (draws.below(2) == 1) & self._flip[which[:, slot]]
            rows = np.flatnonzero(slots > slot)
            sprites = self._sprites[self._first[which[rows, slot]] + picture[rows, slot]]
            sprites[flip[rows]] = sprites[flip[rows], :, :, ::-1]
            paste(canvas, rows, sprites, extent[rows], x[rows], y[rows])

        images = np.rint(canvas).astype(np.uint8).transpose(0, 2, 1, 3)
        captions = self._captions(
            layout.tolist(), which.tolist(), picture.tolist(), draws.below(4).tolist(), colour.tolist(),
            np.where(gradient, other, -1).tolist(),
        )  # fmt: skip
        return ImageBatch(
            images=np.ascontiguousarray(images),
            captions=captions,
            tokens=self.vocabulary.encode(captions, self.caption_length),
            labels=self._label[which[:, 0]],
        )

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

    def _captions(
        self,
        layout: list[int],
        which: list[list[int]],
        picture: list[list[int]],
        style: list[int],
        colour: list[int],
        other: list[int],
    ) -> list[str]:
        """One caption a scene. style: bit 0 adds the kinds, bit 1 tells the relation of a pair from the other end."""
        colours = list(COLOURS)
        captions = []
        for at, chosen, pictures, how, near, far in zip(layout, which, picture, style, colour, other):
            kind = _LAYOUTS[at]
            a, b, c = (self.emoji[e].phrase(p, kind=bool(how & 1)) for e, p in zip(chosen, pictures))
            if kind == "one":
                text = a
            elif kind == "beside":
                text = f"{b} right of {a}" if how & 2 else f"{a} left of {b}"
            elif kind == "above":
                text = f"{b} below {a}" if how & 2 else f"{a} above {b}"
            elif kind == "row":
                text = f"{a}, {b} and {c} from left to right"
            elif kind == "column":
                text = f"{a}, {b} and {c} from top to bottom"
            elif kind == "one above two":
                text = f"{a} above {b} and {c}"
            else:
                text = f"{a} and {b} above {c}"
            ground = f"a {colours[near]} to {colours[far]} gradient" if far >= 0 else colours[near]
            captions.append(f"{text} on {ground}")
        return captions
