"""A folder of the user's own images as a stream: captions from text files, classes from sub-folders."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.draws import Draws
from ditscale.dit.data.stream import ImageBatch
from ditscale.dit.data.words import Vocabulary
from ditscale.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "captions.jsonl"


class ImageFolder:
    """Images below a folder, cropped to a centred square and scaled to `size`.

    path: searched with its sub-folders, links included, for png, jpg, jpeg, webp and bmp files that are not
        hidden.
    size: height and width in pixels after scaling (LANCZOS).
    seed: decides the order of every epoch.
    split: "all", or "train" and "validation", which share no file: the name's hash decides, so that adding
        files moves none.
    held_out: share of files in the validation split; default 0.05.
    vocabulary: default the words of all captions of the folder, both splits, so that the splits agree.
    caption_length: tokens a caption; longer ones are cut. Default 40.
    cache_bytes: decoded images are kept up to this many bytes, later epochs then read no file. Default 1 GiB.

    Captions: a line ``{"file": "cats/a.png", "caption": "..."}`` in ``captions.jsonl`` at the top, else the
    text of ``a.txt`` beside ``a.png``, else the names of its sub-folders, else nothing. Classes: the first
    sub-folders, in alphabetical order; images at the top have label -1. Transparent images are laid on white.

    An epoch shows every image once, in an order of its own: index i is image ``order(i // n)[i % n]`` of the
    n sorted names, whatever was asked for before. Raises InputError for a folder without images, a split
    without images, a bad caption file; at `batch` for a file that is no image.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: int,
        *,
        seed: int = 0,
        split: Literal["all", "train", "validation"] = "all",
        held_out: float = 0.05,
        vocabulary: Vocabulary | None = None,
        caption_length: int = 40,
        cache_bytes: int = 2**30,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"path: expected a folder of images, got {str(path)!r}")
        if size < 1 or caption_length < 1:
            raise InputError(f"size, caption_length: expected at least 1, got {size} and {caption_length}")
        if split not in ("all", "train", "validation"):
            raise InputError(f"split: expected 'all', 'train' or 'validation', got {split!r}")
        if not 0 < held_out < 1:
            raise InputError(f"held_out: expected a share between 0 and 1, got {held_out}")
        self.size, self.seed, self.split, self.caption_length = size, seed, split, caption_length
        every = _image_names(self.path)
        if not every:
            raise InputError(f"path: expected images ({', '.join(SUFFIXES)}) below {str(path)!r}, got none")
        captions = _captions(self.path, every)
        self.vocabulary = vocabulary if vocabulary is not None else Vocabulary.from_captions(captions)
        self.classes = tuple(sorted({name.split("/")[0] for name in every if "/" in name}))
        chosen = [
            i for i, name in enumerate(every) if split == "all" or (_share(name) < held_out) == (split == "validation")
        ]
        if not chosen:
            raise InputError(f"split: expected images for {split!r}, got none of {len(every)} at held_out {held_out}")
        self.names = tuple(every[i] for i in chosen)
        self.captions = tuple(captions[i] for i in chosen)
        index = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array(
            [index.get(name.split("/")[0], -1) if "/" in name else -1 for name in self.names], dtype=np.int64
        )
        self._tokens = self.vocabulary.encode(self.captions, caption_length)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._keep = max(0, cache_bytes // (3 * size * size))

    @property
    def name(self) -> str:
        """``folder:NAME`` with the folder's own name, and ``/train`` or ``/validation`` for a split."""
        return f"folder:{self.path.resolve().name}" + ("" if self.split == "all" else f"/{self.split}")

    @property
    def unique_images(self) -> int:
        """Number of files; the stream repeats them after that many, in another order."""
        return len(self.names)

    @functools.cached_property
    def sha256(self) -> str:
        """Identity: names, bytes and captions of every file, size, seed and vocabulary.

        Reads every file once.
        """
        digest = hashlib.sha256(repr((self.size, self.seed, self.caption_length, self.vocabulary.sha256)).encode())
        for name, caption in zip(self.names, self.captions, strict=True):
            content = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
            digest.update(repr((name, content, caption)).encode())
        return digest.hexdigest()

    def batch(self, start: int, count: int) -> ImageBatch:
        """Images `start` to ``start + count - 1``.

        Raises InputError for a negative start or count, or a file that is no image.
        """
        if start < 0 or count < 0:
            raise InputError(f"start, count: expected non-negative integers, got {start} and {count}")
        total = len(self.names)
        index = np.arange(start, start + count)
        epochs = index // total
        files = np.zeros(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            files[inside] = self._order(epoch)[index[inside] % total]
        images = np.zeros((count, 3, self.size, self.size), dtype=np.uint8)
        for row, file in enumerate(files.tolist()):
            images[row] = self._image(file)
        return ImageBatch(
            images=images,
            captions=[self.captions[file] for file in files],
            tokens=self._tokens[files],
            labels=self.labels[files],
        )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """A permutation of the files, a function of seed and epoch."""
        order = self._orders.get(epoch)
        if order is None:
            draws = Draws(f"image folder {self.seed} {epoch}", np.arange(len(self.names)), 1)
            order = np.argsort(draws.below(2**32), kind="stable")
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}
        return order

    def _image(self, file: int) -> NDArray[np.uint8]:
        image = self._kept.get(file)
        if image is None:
            image = read_image(self.path / self.names[file], self.size)
            if len(self._kept) < self._keep:
                self._kept[file] = image
        return image


def read_image(path: Path, size: int) -> NDArray[np.uint8]:
    """uint8 [3, size, size]: the centred square of an image file, scaled with LANCZOS, transparency on white.

    Honours the orientation that a camera wrote down. Raises InputError when the file cannot be read as an
    image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                layer = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: expected an image, got {error}") from error
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _image_names(path: Path) -> list[str]:
    """Sorted names relative to `path`, with forward slashes."""
    names, seen = [], set()
    for folder, below, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above would go round for ever
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith("."))
        root = Path(folder).relative_to(path)
        names += [
            (root / name).as_posix() for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(names)


def _share(name: str) -> float:
    """A fixed number in 0..1 for a file name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def _captions(path: Path, names: Sequence[str]) -> list[str]:
    """One caption a name, by the order of the class's docstring."""
    told = _told(path / CAPTIONS, set(names)) if (path / CAPTIONS).is_file() else {}
    captions = []
    for name in names:
        beside = (path / name).with_suffix(".txt")
        if name in told:
            captions.append(told[name])
        elif beside.is_file():
            captions.append(" ".join(_text(beside).split()))
        else:
            captions.append(" ".join(name.split("/")[:-1]).replace("_", " ").replace("-", " "))
    return captions


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a text in UTF-8, got {error}") from error


def _told(file: Path, names: set[str]) -> dict[str, str]:
    """File name -> caption from a JSON Lines file."""
    told: dict[str, str] = {}
    for number, line in enumerate(_text(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file"], row["caption"]
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f'{file}, line {number}: expected {{"file": ..., "caption": ...}}, got {line[:80]!r}'
            ) from None
        if name not in names or not isinstance(caption, str):
            raise InputError(
                f"{file}, line {number}: expected the name of an image beside or below it, got {line[:80]!r}"
            )
        told[name] = caption
    return told
