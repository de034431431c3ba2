"""A Hugging Face ``datasets`` data set on disk as a stream. Needs the package ``datasets``, and never the network."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.finite import FiniteImages, Split, numbered_classes
from ditscale.dit.data.folder import UNREADABLE, fitted
from ditscale.dit.data.words import Vocabulary
from ditscale.errors import InputError

_CAPTIONS = ("caption", "text")
_LABELS = ("label", "labels")
_HELD_OUT = ("validation", "test")


class HubImages(FiniteImages):
    """Images of a data set that ``save_to_disk`` wrote.

    path: its folder.
    size, width, seed, split, held_out, vocabulary, words, caption_length, flip, cache_bytes: as `ImageFolder` has them. Where the
        data set has a part "validation" (or "test") beside "train", that is the validation split; otherwise a row's
        number decides.

    The image is the first column of that kind; the caption is the column "caption" or "text", the class the column
    "label" or "labels", each where a part has it; -1 where a row has no label. Classes without names are counted over all
    parts.

    Raises InputError where ``datasets`` is not installed, the folder holds no data set with images, or a label or caption is
    none.
    """

    kind = "hub"

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
        self.path, self.seed = Path(path), seed
        parts = _load(self.path)
        apart = next((name for name in _HELD_OUT if name in parts and len(parts) > 1), None)
        if apart and split != "all":
            kept = [apart] if split == "validation" else [name for name in parts if name not in _HELD_OUT]
        else:
            kept = list(parts)
        chosen: dict[str, Any] = {name: parts[name] for name in kept}
        captions = {name: _captions(self.path, part) for name, part in parts.items()}
        if vocabulary is None:
            every = (caption for part in captions.values() for caption in part)
            vocabulary = Vocabulary.from_captions(every, most=words)
        # Of every part, so that the splits agree on the classes, and none needs the columns of another.
        labels = {name: _labels(self.path, part) for name, part in parts.items()}
        self._rows = [(name, row) for name, part in chosen.items() for row in range(len(part))]
        self._parts = chosen
        self._images = {name: _image_column(self.path, part) for name, part in chosen.items()}
        super().__init__(
            keys=[f"{name}/{row}" for name, row in self._rows],
            captions=[caption for name in chosen for caption in captions[name]],
            labels=[label for name in chosen for label in labels[name]],
            classes=_classes(self.path, parts, [label for part in labels.values() for label in part]),
            order_key=f"hub images {seed}",
            shape=(3, size, size if width is None else width),
            split="all" if apart else split,
            held_out=held_out,
            vocabulary=vocabulary,
            words=words,
            caption_length=caption_length,
            flip=flip,
            cache_bytes=cache_bytes,
        )
        self.split = split

    @functools.cached_property
    def sha256(self) -> str:
        """Identity: the fingerprints that ``datasets`` gives, which rows, size, seed and vocabulary."""
        prints = [(name, part._fingerprint, len(part)) for name, part in self._parts.items()]
        return hashlib.sha256(repr((self._settings(), self.seed, prints, self.names)).encode()).hexdigest()

    def _read(self, sample: int) -> NDArray[np.uint8]:
        from PIL import Image

        name, row = self._rows[self.chosen[sample]]
        try:
            return fitted(self._parts[name][row][self._images[name]], self.shape[1:])
        except (*UNREADABLE, AttributeError, struct.error, Image.DecompressionBombError) as error:
            # struct.error: datasets turns images upright as PIL does, which fails at some EXIF.
            raise InputError(f"{self.path}: expected an image in row {row} of {name}, got {error}") from error


def _load(path: Path) -> dict[str, Any]:
    """Part's name -> rows."""
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data: expected the package datasets to be installed (pip install 'ditscale[datasets]'), got none ({error})"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, TypeError, IndexError) as error:  # IndexError: of no rows
        raise InputError(f"{path}: expected a data set that save_to_disk wrote, got {error}") from error
    parts = found if isinstance(found, datasets.DatasetDict) else {"train": found}
    return {name: _plain(part) for name, part in parts.items()}


def _plain(part: Any) -> Any:
    """A part without the format that it was saved in, such as torch's, or of some of its columns: pictures would be arrays."""
    shown = part.format["type"], set(part.format["columns"])
    # Only then, as it is another fingerprint.
    return part if shown == (None, set(part.column_names)) else part.with_format(None)


def _labels(path: Path, part: Any) -> list[int]:
    """The class of every row of a part, -1 where there is none."""
    column = next((name for name in _LABELS if name in part.features), None)
    if column is None:
        return [-1] * len(part)
    labels = []
    for label in part[column]:
        try:
            labels.append(-1 if label is None else int(label))
            if isinstance(label, float) and labels[-1] != label:
                raise ValueError("a fraction")
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"{path}: expected classes or whole numbers in column {column}, got {label!r}") from error
    return labels


def _classes(path: Path, parts: Mapping[str, Any], labels: Sequence[int]) -> Sequence[str]:
    """Names of the classes, as the parts tell them that name any, or else their numbers."""
    columns = (part.features[name] for part in parts.values() for name in _LABELS if name in part.features)
    named = [names for column in columns if (names := getattr(column, "names", None))]
    if not named:
        return numbered_classes(labels, str(path))
    names = named[0]
    # One number would stand for two classes, as where each part's were numbered by themselves.
    if other := next((found for found in named if found != names), None):
        raise InputError(f"{path}: expected the same classes in every part, got {names} and {other}")
    if max(labels, default=-1) >= len(names):
        raise InputError(f"{path}: expected labels below {len(names)}, the classes named, got {max(labels)}")
    return list(names)


def _captions(path: Path, part: Any) -> list[str]:
    """The caption of every row of a part, empty where there is none."""
    column = next((name for name in _CAPTIONS if name in part.features), None)
    if column is None:
        return [""] * len(part)
    captions = []
    for text in part[column]:
        # Several captions of an image, as some data sets have them, would be one with brackets and quotation marks.
        if not (text is None or isinstance(text, str)):
            raise InputError(f"{path}: expected a text in column {column}, got {str(text)[:80]}")
        captions.append(text or "")
    return captions


def _image_column(path: Path, part: Any) -> str:
    for name, feature in part.features.items():
        if type(feature).__name__ == "Image":
            return str(name)
    raise InputError(f"{path}: expected a column of images, got {', '.join(part.features)}")
