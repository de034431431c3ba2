"""WebDataset shards as a stream: tar files whose members of one stem are one sample."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.cache import cached_path
from ditscale.dit.data.finite import FiniteImages, Split, numbered_classes
from ditscale.dit.data.folder import SUFFIXES, read_image
from ditscale.dit.data.words import Vocabulary
from ditscale.dit.files import keep
from ditscale.errors import InputError

_TEXTS = (".txt", ".json", ".cls")


@dataclass(frozen=True)
class _Member:
    """A file in a shard: where its bytes lie."""

    shard: int
    offset: int
    size: int


class ImageShards(FiniteImages):
    """Images in tar shards in the layout of WebDataset: ``0001.jpg``, ``0001.txt``, ``0002.jpg``, ...

    path: a folder with ``*.tar`` files, not compressed; they are read at random places, so they belong on a disk.
    size, width, seed, split, held_out, vocabulary, words, caption_length, flip: as `ImageFolder` has them; the splits go by
        shard and key.
    cache_bytes: decoded images are kept up to this many bytes; default none.

    A sample has one image (png, jpg, jpeg, webp, bmp). Its caption is its ``.txt``, or "caption" (or "text") of its
    ``.json``; its class is the whole number in its ``.cls``, or "label" of its ``.json``. The order of an epoch mixes the
    samples of a few shards at a time.

    The first reading lists the members of every shard and keeps the list in the cache folder (``DITSCALE_CACHE``), by
    the shard's path, size and time. Raises InputError for a folder without shards, a shard that is no tar file, is
    compressed, cut short or several in one, a sample with several images or a file twice, bad texts; at `batch` for an image
    that is none.
    """

    kind = "shards"

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        width: int | None = None,
        seed: int = 0,
        split: Split = "all",
        held_out: float = 0.05,
        vocabulary: Vocabulary | None = None,
        words: int | None = None,
        caption_length: int = 40,
        flip: bool = False,
        cache_bytes: int = 0,
    ) -> None:
        self.path, self.seed = Path(path), seed
        self.shards = sorted(self.path.glob("*.tar"))
        if not self.shards:
            raise InputError(f"path: expected a folder of *.tar shards, got none in {str(path)!r}")
        samples = [sample for number, shard in enumerate(self.shards) for sample in _samples(number, shard)]
        if not samples:
            raise InputError(f"path: expected samples with an image in {str(path)!r}, got none")
        self._members = [member for _, member, _, _ in samples]
        labels = [label for _, _, _, label in samples]
        super().__init__(
            keys=[f"{self.shards[member.shard].name}/{key}" for key, member, _, _ in samples],
            captions=[caption for _, _, caption, _ in samples],
            labels=labels,
            classes=numbered_classes(labels, str(path)),
            order_key=f"image shards {seed}",
            shape=(3, size, size if width is None else width),
            split=split,
            held_out=held_out,
            vocabulary=vocabulary,
            words=words,
            caption_length=caption_length,
            flip=flip,
            cache_bytes=cache_bytes,
            groups=[member.shard for member in self._members],
        )

    @functools.cached_property
    def sha256(self) -> str:
        """Identity: names, sizes, captions and labels of every sample, size, seed and vocabulary; not the pixels."""
        digest = hashlib.sha256(repr((self._settings(), self.seed)).encode())
        for sample, name in enumerate(self.names):
            member = self._members[self.chosen[sample]]
            told = (name, member.offset, member.size, self.captions[sample], int(self.labels[sample]))
            digest.update(repr(told).encode())
        return digest.hexdigest()

    def files(self, start: int, count: int) -> Iterator[bytes]:
        """The images' files, as they lie in the shards, at places `start` to ``start + count - 1``."""
        for sample in self._order.samples(start, count).tolist():
            yield self._file(sample)

    def _file(self, sample: int) -> bytes:
        member = self._members[self.chosen[sample]]
        return _bytes(self.shards[member.shard], member)

    def _read(self, sample: int) -> NDArray[np.uint8]:
        shard = self.shards[self._members[self.chosen[sample]].shard]
        return read_image(io.BytesIO(self._file(sample)), self.shape[1:], f"{shard}: {self.names[sample]}")


def _bytes(shard: Path, member: _Member) -> bytes:
    try:
        with open(shard, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)
    except OSError as error:
        raise InputError(f"{shard}: expected a shard that can be read, got {error.strerror}") from error


def _samples(number: int, shard: Path) -> list[tuple[str, _Member, str, int]]:
    """(key, image, caption, label) of every sample of a shard."""
    found = []
    for key, files in _index(shard).items():
        images = [ending for ending in files if ending.endswith(SUFFIXES)]
        if len(images) > 1:
            raise InputError(f"{shard}: expected one image a sample, got {', '.join(images)} of {key!r}")
        if images:
            texts = {ending: _bytes(shard, _Member(number, *files[ending])) for ending in _TEXTS if ending in files}
            found.append((key, _Member(number, *files[images[0]]), *_told(shard, key, texts)))
    return found


def _told(shard: Path, key: str, texts: dict[str, bytes]) -> tuple[str, int]:
    """Caption and label of a sample, from its texts."""
    try:
        row: dict[str, Any] = json.loads(texts[".json"]) if ".json" in texts else {}
        caption = row.get("caption", row.get("text", ""))
        if ".txt" in texts:
            caption = " ".join(texts[".txt"].decode("utf-8-sig").split())
        label = int(texts[".cls"]) if ".cls" in texts else row.get("label", -1)
        if not isinstance(caption, str) or isinstance(label, bool) or not isinstance(label, int) or label < -1:
            raise ValueError(f"caption {caption!r} and label {label!r}")
    except (ValueError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{shard}: expected a caption in text and a whole number as class of {key!r}, got {error}"
        ) from error
    return caption, label


def _index(shard: Path) -> dict[str, dict[str, Sequence[int]]]:
    """Stem -> ending -> (offset, size) of every file in a shard, from the cache where it is the same shard."""
    try:
        state = shard.stat()
        # "one": lists that were kept before the end of a shard, what follows it and second files of a name were checked, and
        # hard links followed, are not taken.
        identity = repr(("one", str(shard.resolve()), state.st_size, state.st_mtime_ns))
        kept = cached_path("shards", hashlib.sha256(identity.encode()).hexdigest() + ".json")
        if kept is not None and kept.is_file():
            index: dict[str, dict[str, Sequence[int]]] = json.loads(kept.read_text(encoding="utf-8"))
            return index
        index = {}
        places: dict[str, tuple[int, int]] = {}
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                stem, dot, ending = os.path.basename(member.name).partition(".")
                if member.isfile():
                    places[member.name] = (member.offset_data, member.size)
                elif member.islnk() and member.linkname in places:
                    # A file that is there under an earlier name too, as tar writes down equal files that share their bytes.
                    places[member.name] = places[member.linkname]
                if member.name in places and stem and dot:
                    key, ending = os.path.join(os.path.dirname(member.name), stem), "." + ending.lower()
                    files = index.setdefault(key, {})
                    if ending in files and ending.endswith((*SUFFIXES, *_TEXTS)):  # one of the two would be missing
                        raise ValueError(f"two files {ending} of {key!r}")
                    files[ending] = places[member.name]
            # tarfile takes a header that is cut off or damaged for the end, which a whole file marks with zeros.
            if _bytes(shard, _Member(0, tar.offset, tarfile.BLOCKSIZE)) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"no end of the archive after {tar.offset} bytes: the file is cut short or damaged")
            with open(shard, "rb") as file:
                file.seek(tar.offset)
                while rest := file.read(1 << 20):
                    if rest.strip(b"\0"):  # of which no sample would be seen
                        raise ValueError(f"more behind the end of the archive, {tar.offset} bytes: several in one file")
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"{shard}: expected a tar file, not compressed, each file once, got {error}") from error
    keep(kept, json.dumps(index).encode())
    return index
