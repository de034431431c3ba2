"""A finite set of captioned samples as an endless stream: splits, orders of every epoch, captions, mirrored halves."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.draws import Draws
from ditscale.dit.data.stream import ImageBatch
from ditscale.dit.data.words import Vocabulary
from ditscale.errors import InputError

Split = Literal["all", "train", "validation"]
# Shards whose samples are mixed with each other at a time: enough for variety, few enough to read them in long stretches.
MIXED_SHARDS = 8
_MOST_CLASSES = 1_000_000


class EpochOrder:
    """A fresh permutation of n samples in every epoch, a function of a key and the epoch's number.

    key: any text that names the stream (kind, seed).
    groups: int [n], rising: the shard that each sample lies in; default one for all. Shards come in an order of their
        own, and only samples of `MIXED_SHARDS` shards are mixed, so that reading stays in few files at a time.
    """

    def __init__(self, key: str, count: int, groups: NDArray[np.int64] | None = None) -> None:
        self._key, self._count, self._groups = key, count, groups
        self._kept: dict[int, NDArray[np.int64]] = {}

    def samples(self, start: int, count: int) -> NDArray[np.int64]:
        """The samples at places `start` to ``start + count - 1`` of the endless sequence."""
        index = np.arange(start, start + count)
        epochs = index // self._count
        found = np.zeros(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            found[inside] = self._order(epoch)[index[inside] % self._count]
        return found

    def _order(self, epoch: int) -> NDArray[np.int64]:
        order = self._kept.get(epoch)
        if order is None:
            draws = Draws(f"{self._key} {epoch}", np.arange(self._count), 1).below(2**32)
            if self._groups is None:
                order = np.argsort(draws, kind="stable")
            else:
                _, shard = np.unique(self._groups, return_inverse=True)
                places = Draws(f"{self._key} {epoch} shards", np.arange(shard.max() + 1), 1).below(2**32)
                rank = np.argsort(np.argsort(places, kind="stable"), kind="stable")
                order = np.lexsort((draws, rank[shard] // MIXED_SHARDS))
            self._kept = {**dict(list(self._kept.items())[-1:]), epoch: order}
        return order


class FiniteImages:
    """What all finite sources share; a source adds `kind`, which its name begins with, its `path`, `sha256` and `_read`.

    keys: a name of every sample, by whose hash it falls into a split, so that adding samples moves none.
    captions, labels: of every sample; label -1 where it has no class.
    classes: names of the labels.
    order_key: names the stream for the order of its epochs, seed included.
    shape: of a sample, (3, height, width) for pictures.
    split, held_out: which part, and the share of the validation split.
    vocabulary: default the `words` most frequent words of all captions, of both splits so that they agree.
    words: size of that vocabulary, its two special entries included; default every word.
    caption_length: tokens a caption; longer ones are cut.
    flip: show every sample mirrored at half of its places.
    cache_bytes: samples are kept in memory up to this many bytes.
    groups: int of every sample, the shard it lies in; see `EpochOrder`.
    """

    kind: ClassVar[str]
    dtype: type[np.generic] = np.uint8
    path: Path

    def __init__(
        self,
        *,
        keys: Sequence[str],
        captions: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        order_key: str,
        shape: tuple[int, ...],
        split: Split,
        held_out: float,
        vocabulary: Vocabulary | None,
        words: int | None,
        caption_length: int,
        flip: bool,
        cache_bytes: int,
        groups: Sequence[int] | None = None,
    ) -> None:
        if min(shape) < 1 or caption_length < 1:
            raise InputError(f"size, caption_length: expected at least 1, got {shape[-1]} and {caption_length}")
        if split not in ("all", "train", "validation"):
            raise InputError(f"split: expected 'all', 'train' or 'validation', got {split!r}")
        if not 0 < held_out < 1:
            raise InputError(f"held_out: expected a share between 0 and 1, got {held_out}")
        chosen = [
            i for i, key in enumerate(keys) if split == "all" or (_share(key) < held_out) == (split == "validation")
        ]
        if not chosen:
            raise InputError(f"split: expected images for {split!r}, got none of {len(keys)} at held_out {held_out}")
        self.shape, self.split, self.caption_length, self.flip = shape, split, caption_length, flip
        self.classes = tuple(classes)
        self.vocabulary = vocabulary if vocabulary is not None else Vocabulary.from_captions(captions, most=words)
        self.chosen = np.array(chosen, dtype=np.int64)
        self.names = tuple(keys[i] for i in chosen)
        self.captions = tuple(captions[i] for i in chosen)
        self.labels = np.array([labels[i] for i in chosen], dtype=np.int64)
        self._tokens = self.vocabulary.encode(self.captions, caption_length)
        self._order = EpochOrder(
            order_key, len(chosen), None if groups is None else np.array([groups[i] for i in chosen], dtype=np.int64)
        )
        self._flips = f"{order_key} flip"
        self._kept: dict[int, NDArray[Any]] = {}
        self._keep = max(0, cache_bytes // (int(np.prod(shape)) * np.dtype(self.dtype).itemsize))

    @property
    def name(self) -> str:
        """``KIND:NAME`` with the folder's own name, not a link's, and ``/train`` or ``/validation`` for a split."""
        folder = os.path.basename(os.path.realpath(self.path))
        return f"{self.kind}:{folder}" + ("" if self.split == "all" else f"/{self.split}")

    @property
    def size(self) -> int:
        """Height and width of a sample."""
        return self.shape[-1]

    @property
    def unique_images(self) -> int:
        """Number of samples; the stream repeats them after that many, in another order."""
        return len(self.names)

    def batch(self, start: int, count: int) -> ImageBatch:
        """Samples at places `start` to ``start + count - 1``.

        Raises InputError for a negative start or count, or a sample that cannot be read.
        """
        if start < 0 or count < 0:
            raise InputError(f"start, count: expected non-negative integers, got {start} and {count}")
        samples = self._order.samples(start, count)
        mirrored = np.zeros(count, dtype=bool)
        if self.flip:
            mirrored = Draws(self._flips, np.arange(start, start + count), 1).below(2).astype(bool)
        images = np.zeros((count, *self.shape), dtype=self.dtype)
        for row, (sample, turned) in enumerate(zip(samples.tolist(), mirrored.tolist(), strict=True)):
            images[row] = self._mirrored(sample) if turned else self._sample(sample)
        return ImageBatch(
            images=images,
            captions=[self.captions[sample] for sample in samples],
            tokens=self._tokens[samples],
            labels=self.labels[samples],
        )

    def _sample(self, sample: int) -> NDArray[Any]:
        image = self._kept.get(sample)
        if image is None:
            image = self._read(sample)
            if len(self._kept) < self._keep:
                self._kept[sample] = image
        return image

    def _read(self, sample: int) -> NDArray[Any]:
        """The sample of this split with this number, from disk."""
        raise NotImplementedError

    def _mirrored(self, sample: int) -> NDArray[Any]:
        return self._sample(sample)[..., ::-1]

    def _settings(self) -> str:
        """What beside the samples decides what the stream shows; for `sha256`."""
        shape = self.shape[-1] if self.shape[-1] == self.shape[-2] else self.shape[-2:]
        settings = (shape, self.caption_length, self.vocabulary.sha256)
        return repr((*settings, "flip") if self.flip else settings)

    def __getstate__(self) -> dict[str, Any]:
        # Workers begin with an empty cache: sending it would take longer than reading it again.
        return {**self.__dict__, "_kept": {}}


def numbered_classes(labels: Sequence[int], place: str) -> list[str]:
    """The names of classes that only have numbers.

    Raises InputError, which begins with `place`, for a number that can be no class's: each would get a name, and its row in a
    model.
    """
    most = max(labels, default=-1)
    if most >= _MOST_CLASSES:
        raise InputError(f"{place}: expected classes numbered from 0, below {_MOST_CLASSES:,}, got {most}")
    return [str(label) for label in range(most + 1)]


def _share(name: str) -> float:
    """A fixed number in 0..1 for a name."""
    # A file's name need not be UTF-8: Python holds its other bytes as surrogates.
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48
