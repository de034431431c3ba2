"""A folder of the user's own images as a stream: captions from text files, classes from sub-folders."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.finite import FiniteImages, Split
from ditscale.dit.data.words import Vocabulary
from ditscale.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "captions.jsonl"
_ORIENTATION = 0x0112  # the EXIF tag
# What turns an image of that orientation upright; 1 is upright.
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# What PIL raises at a file that is damaged or no image; RuntimeError is that of its AVIF, whatever the file is called.
UNREADABLE = (OSError, ValueError, SyntaxError, RuntimeError)


class ImageFolder(FiniteImages):
    """Images below a folder, cropped about their centres to the shape that is asked for, and scaled.

    path: searched with its sub-folders, links included, for png, jpg, jpeg, webp and bmp files that are not
        hidden.
    size: height in pixels after scaling (LANCZOS), and width where that is not given.
    width: in pixels, where images are no squares; default `size`.
    seed: decides the order of every epoch.
    split: "all", or "train" and "validation", which share no file: the name's hash decides, so that adding
        files moves none.
    held_out: share of files in the validation split; default 0.05.
    vocabulary: default the `words` most frequent words of all captions of the folder, both splits, so that the splits
        agree; without `words` all of them.
    caption_length: tokens a caption; longer ones are cut. Default 40.
    flip: show every image mirrored at half of its places; default False.
    cache_bytes: decoded images are kept up to this many bytes, later epochs then read no file. Default 1 GiB.

    Captions: a line ``{"file": "cats/a.png", "caption": "..."}`` in ``captions.jsonl`` at the top, else the
    text of ``a.txt`` beside ``a.png``, else the names of its sub-folders, else nothing. Classes: the first
    sub-folders, in alphabetical order; images at the top have label -1. Transparent images are laid on white.

    An epoch shows every image once, in an order of its own: index i is image ``order(i // n)[i % n]`` of the
    n sorted names, whatever was asked for before. Raises InputError for a folder without images, a split
    without images, a bad caption file; at `batch` for a file that is no image.
    """

    kind = "folder"

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
        cache_bytes: int = 2**30,
    ) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise InputError(f"path: expected a folder of images, got {str(path)!r}")
        names = _image_names(self.path)
        if not names:
            raise InputError(f"path: expected images ({', '.join(SUFFIXES)}) below {str(path)!r}, got none")
        classes = sorted({name.split("/")[0] for name in names if "/" in name})
        index = {name: label for label, name in enumerate(classes)}
        self.seed = seed
        super().__init__(
            keys=names,
            captions=_captions(self.path, names),
            labels=[index[name.split("/")[0]] if "/" in name else -1 for name in names],
            classes=classes,
            order_key=f"image folder {seed}",
            shape=(3, size, size if width is None else width),
            split=split,
            held_out=held_out,
            vocabulary=vocabulary,
            words=words,
            caption_length=caption_length,
            flip=flip,
            cache_bytes=cache_bytes,
        )

    @functools.cached_property
    def sha256(self) -> str:
        """Identity: names, bytes and captions of every file, size, seed and vocabulary.

        Reads every file once.
        """
        digest = hashlib.sha256(repr((self._settings(), self.seed)).encode())
        for name, caption in zip(self.names, self.captions, strict=True):
            content = hashlib.sha256((self.path / name).read_bytes()).hexdigest()
            digest.update(repr((name, content, caption)).encode())
        return digest.hexdigest()

    def _read(self, sample: int) -> NDArray[np.uint8]:
        path = self.path / self.names[sample]
        return read_image(path, self.shape[1:], str(path))


def read_image(source: Path | IO[bytes], shape: Sequence[int], name: str) -> NDArray[np.uint8]:
    """uint8 [3, *shape] (height, width): the middle of an image file, scaled with LANCZOS, transparency on white.

    Honours the orientation that a camera wrote down. Raises InputError, which says `name`, when the file cannot be read as
    an image.
    """
    from PIL import Image

    try:
        with Image.open(source) as file:
            return fitted(file, shape)
    except (*UNREADABLE, Image.DecompressionBombError) as error:
        raise InputError(f"{name}: expected an image, got {error}") from error


def fitted(image: Any, shape: Sequence[int]) -> NDArray[np.uint8]:
    """A PIL image as `read_image` gives it."""
    from PIL import Image, ImageOps

    image.load()  # a PNG may tell its orientation behind its pixels
    # Not exif_transpose: it also writes the other tags anew, and fails at one that it cannot write.
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if turn is not None:
        image = image.transpose(Image.Transpose[turn])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    height, width = shape
    pixels = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
    return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


def _eight_bits(image: Any) -> Any:
    """Grey levels of 16 bits as those of eight; PIL's own conversion makes white of all above 255.

    Modes "I;16", and "I", by which PIL reads such files too. Raises ValueError for levels outside 0..65535 and floats.
    """
    from PIL import Image

    values = np.array(image.convert("I"))
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError("grey levels that are not of 8 or 16 bits")
    values[values == image.info.get("transparency", 65535)] = 65535  # on white
    return Image.fromarray((values >> 8).astype(np.uint8))


def _image_names(path: Path) -> list[str]:
    """Sorted names relative to `path`, with forward slashes."""

    def fail(error: OSError) -> None:  # else its images would be missing in silence
        raise InputError(f"{error.filename}: expected a folder that can be read, got {error.strerror}") from error

    names, seen = [], set()
    for folder, below, files in os.walk(path, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above would go round for ever
            below.clear()
            continue
        seen.add(real)
        # The system's own folder at the root of a disk, which nobody else may read, is no part of the data.
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "lost+found")
        root = Path(folder).relative_to(path)
        names += [
            (root / name).as_posix() for name in files if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(names)


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
        return file.read_text(encoding="utf-8-sig")  # editors on Windows begin it with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: expected a text in UTF-8, got {error}") from error


def _told(file: Path, names: set[str]) -> dict[str, str]:
    """File name -> caption from a JSON Lines file."""
    told: dict[str, str] = {}
    # Not splitlines, which also ends lines at characters that JSON allows inside a string.
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, caption = row["file"], row["caption"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InputError(
                f'{file}, line {number}: expected {{"file": ..., "caption": ...}}, got {line[:80]!r}'
            ) from None
        if not isinstance(caption, str):
            raise InputError(f"{file}, line {number}: expected a caption that is a text, got {line[:80]!r}")
        if not isinstance(name, str) or name not in names:
            raise InputError(
                f"{file}, line {number}: expected the name of an image beside or below it, got {line[:80]!r}"
            )
        if told.get(name, caption) != caption:
            raise InputError(f"{file}, line {number}: expected one caption of {name}, got a second, {caption[:80]!r}")
        told[name] = caption
    return told
