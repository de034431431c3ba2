"""Word-level vocabulary: captions to integers and back, with nothing to train and nothing to download."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError

PAD, UNKNOWN = 0, 1
# No word begins with a mark: what is left of an emoji may.
_WORD = re.compile(r"(?=[\w'])[a-z0-9'\x80-\U0010ffff]+|[,()]")


def split_words(caption: str) -> list[str]:
    """Lower-case words, commas and parentheses of a caption, in order; all else separates.

    Words are letters of any script with their marks, digits and apostrophes. Accents are composed (NFC), so that a word is one
    however it was typed.
    """
    text = caption.lower()
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
        text = "".join(c if c.isascii() or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    return _WORD.findall(text)


class Vocabulary:
    """Words in a fixed order; index 0 pads, index 1 stands for every unknown word.

    words: the known words without the two special entries. Their order is their numbering, starting at 2.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self.words = ("", "<unknown>", *words)
        self._index = {word: i for i, word in enumerate(self.words) if i > UNKNOWN}
        if len(self._index) != len(self.words) - 2:
            raise InputError("words: expected each word once, got a repeated word")

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._index

    @classmethod
    def from_captions(cls, captions: Iterable[str], *, most: int | None = None) -> Vocabulary:
        """The vocabulary of the words that occur in `captions`, in alphabetical order.

        most: entries at most, the two special ones included; the most frequent words stay, the earlier in the alphabet
            of two that are as frequent. Default: all words stay.
        """
        counts = Counter(word for caption in captions for word in split_words(caption))
        kept = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(sorted(kept if most is None else kept[: max(0, most - 2)]))

    @property
    def sha256(self) -> str:
        """Identity of the words and their numbering."""
        return hashlib.sha256("\n".join(self.words).encode()).hexdigest()

    def encode(self, captions: Sequence[str], length: int) -> NDArray[np.int64]:
        """int64 [n, length]: one row a caption, padded with 0, cut after `length` words."""
        if isinstance(captions, str):
            raise InputError(f"captions: expected a list of strings, got one string {captions!r}")
        if length < 1:
            raise InputError(f"length: expected at least 1, got {length}")
        tokens = np.zeros((len(captions), length), dtype=np.int64)
        get = self._index.get
        for row, caption in enumerate(captions):
            ids = [get(word, UNKNOWN) for word in split_words(caption)][:length]
            tokens[row, : len(ids)] = ids
        return tokens

    def decode(self, tokens: NDArray[np.integer]) -> list[str]:
        """The captions of int [n, L] tokens; padding is left out and an unknown word reads ``<unknown>``."""
        if tokens.ndim != 2 or (tokens.size and (tokens.min() < 0 or tokens.max() >= len(self))):
            raise InputError(f"tokens: expected [n, L] integers in 0..{len(self) - 1}, got shape {tokens.shape}")
        captions = []
        for row in tokens.tolist():
            text = " ".join(self.words[token] for token in row if token != PAD)
            captions.append(text.replace(" ,", ",").replace("( ", "(").replace(" )", ")"))
        return captions
