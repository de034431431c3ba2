"""The embedded emoji: pictures, names and the split, verified against their hashes and loaded once.

The files, their licences and how they were made stand beside them in ``assets/``;
``tools/make_emoji_pack.py`` rebuilds them.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError

ASSETS = Path(__file__).parent / "assets"
SHA256 = {
    "emoji.npz": "37ece3a38ece33b1a2ba62461760f0f1bbfa7a4898f7ea8e4d437f6d06c464be",
    "emoji.json": "3e3db8ede19d4f39929a41ca2989620666ccfb462c2f297edd12259082ddf3f7",
}
SIDE = 32
_PERSONS = {"person", "people", "man", "men", "woman", "women"}
CATEGORIES = ("smileys", "people", "nature", "food", "travel", "activities", "objects", "symbols", "flags")
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Emoji:
    """One emoji and its skin-tone variants.

    name: lower-case words; article: "a", "an", "the" or ""; kind: what sort of thing it is ("fruit").
    codepoints: Unicode code points in hexadecimal, joined by "-", one entry a picture (the base first).
    tones: one entry a picture, such as "dark skin"; the base has "".
    first: row of the base picture; picture j of this emoji is row ``first + j``.
    group: emoji that look alike, or differ by person only, share this number and stand in one split.
    flip: whether a mirrored picture still is what the name says.
    """

    name: str
    article: str
    kind: str
    category: str
    codepoints: tuple[str, ...]
    tones: tuple[str, ...]
    first: int
    group: int
    split: Split
    flip: bool

    @property
    def _says_kind(self) -> bool:
        """Whether the name tells the kind: "a cat face" needs no "(face)", "a man running" no "(person)"."""
        named = set(self.name.split())
        if self.kind in ("person", "people"):
            return bool(named & _PERSONS)
        return any(word in named or f"{word}s" in named for word in self.kind.split())

    def phrase(self, picture: int = 0, *, kind: bool = False) -> str:
        """What a caption calls picture `picture`: "a red apple", with `kind` "a red apple (fruit)"."""
        words = [self.article] if self.article else []
        words.append(self.name)
        if self.tones[picture]:
            words.append(f"with {self.tones[picture]}")
        if kind and not self._says_kind:
            words.append(f"({self.kind})")
        return " ".join(words)


@dataclass(frozen=True)
class EmojiPack:
    """All emoji and their pictures.

    sprites: uint8 [N, 32, 4, 32] (row, channel, column): sRGB multiplied by alpha, then alpha.
    sha256: identity of both files.
    """

    emoji: tuple[Emoji, ...]
    sprites: NDArray[np.uint8]
    sha256: str

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The pictures as uint8 [N, 4, 32, 32], a view of `sprites`."""
        view: NDArray[np.uint8] = self.sprites.transpose(0, 2, 1, 3)
        return view

    def split(self, split: Split) -> tuple[Emoji, ...]:
        """The emoji of one split, in pack order."""
        return tuple(emoji for emoji in self.emoji if emoji.split == split)


def read_asset(path: Path, sha256: str) -> bytes:
    """The bytes of an asset, or InputError when it is missing or not the file that was published."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path.name}: expected an embedded data file at {path}, got {error.strerror}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise InputError(
            f"{path.name}: expected sha256 {sha256[:16]}..., got {found[:16]}...: "
            f"the file is damaged, reinstall ditscale ({path})"
        )
    return data


@functools.lru_cache(maxsize=1)
def load_pack(folder: Path = ASSETS) -> EmojiPack:
    """Read and verify the pack; the second call returns the same object.

    folder: where ``emoji.npz`` and ``emoji.json`` lie; default the copy inside the package.
    Raises InputError when a file is missing or its hash is not the recorded one.
    """
    with np.load(io.BytesIO(read_asset(folder / "emoji.npz", SHA256["emoji.npz"])), allow_pickle=False) as arrays:
        sprites = arrays["sprites"]
    sprites.setflags(write=False)
    table = json.loads(read_asset(folder / "emoji.json", SHA256["emoji.json"]))
    emoji = []
    for row in table["emoji"]:
        variants = row.pop("variants")
        row["tones"] = ("", *(variant["tone"] for variant in variants))
        row["codepoints"] = (row["codepoints"], *(variant["codepoints"] for variant in variants))
        emoji.append(Emoji(**row))
    identity = hashlib.sha256("".join(SHA256[name] for name in sorted(SHA256)).encode()).hexdigest()
    return EmojiPack(emoji=tuple(emoji), sprites=sprites, sha256=identity)
