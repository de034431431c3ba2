"""Cached latents as a stream: a folder of safetensors shards, read a sample at a time where they lie.

``latents.json`` describes them: ``{"format": 1, "latent_factor": 8, "mean": [...], "std": [...], "classes": [...]}``, each but
the first with a default. A shard ``NAME.safetensors`` holds "latents" [n, C, ...] float16, bfloat16 or float32, and where
there are such "flipped" (those of the mirrored images), "labels" [n] int64, "features" [n, S, W] and "pooled" [n, V] of a text
encoder. ``NAME.captions.jsonl`` beside it has the n captions, one JSON string a line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.dit.data.finite import FiniteImages, Split, numbered_classes
from ditscale.dit.data.stream import ImageBatch
from ditscale.dit.data.words import Vocabulary
from ditscale.dit.files import write_atomically, write_json
from ditscale.errors import InputError

DESCRIPTION = "latents.json"
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}
# How LightningDiT's extraction names the mirrored ones.
_FLIPPED = ("flipped", "latents_flip")


class _Shard:
    """The tensors of a safetensors file, mapped, not read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if not 2 <= length <= 10**8:
                    raise ValueError(f"a header of {length} bytes")
                header: dict[str, Any] = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("a header that is no JSON object")
            self.tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            self._base = 8 + length
            if self._base + max(e["data_offsets"][1] for e in self.tensors.values()) > path.stat().st_size:
                raise ValueError("a file cut short")
            unknown = {e["dtype"] for e in self.tensors.values()} - set(_TYPES)
            if unknown:
                raise ValueError(f"numbers of type {sorted(unknown)[0]}")
            counts = {name: e["shape"][0] for name, e in self.tensors.items()}
            if "latents" not in counts or len(set(counts.values())) != 1 or not counts["latents"]:
                raise ValueError(f"tensors with so many rows: {counts}")
            shapes = {name: e["shape"][1:] for name, e in self.tensors.items()}
            latent = shapes["latents"]
            # What is read by rows only would fail at one of them, in a step.
            if len(latent) < 3 or any(shapes.get(name, latent) != latent for name in _FLIPPED) or shapes.get("labels"):
                raise ValueError(f"rows of shapes {shapes}")
            if self.tensors.get("labels", {"dtype": "I64"})["dtype"] != "I64":
                raise ValueError(f"labels of type {self.tensors['labels']['dtype']}")
        except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: expected a shard of latents, got {error}") from error
        self.count: int = counts["latents"]
        self.sha256 = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()

    def row(self, name: str, row: int) -> NDArray[Any]:
        """One row of a tensor: float32, or int64."""
        return _widened(self._map(name)[row], self.tensors[name]["dtype"])

    def column(self, name: str) -> NDArray[Any]:
        """All rows of a tensor."""
        return _widened(self._map(name)[:], self.tensors[name]["dtype"])

    def _map(self, name: str) -> NDArray[Any]:
        entry = self.tensors[name]
        return np.memmap(
            self.path, _TYPES[entry["dtype"]], "r", self._base + entry["data_offsets"][0], tuple(entry["shape"])
        )


def _widened(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.int64 if dtype == "I64" else np.float32)


class LatentShards(FiniteImages):
    """Latents that an autoencoder made beforehand.

    path: the folder, laid out as above.
    seed, split, held_out, vocabulary, words, caption_length, flip: as `ImageFolder` has them; the splits go by shard and
        row. `flip` needs the latents of the mirrored images.

    Latents come as ``(latent - mean) / std``, mean and std of every channel as the description gives them; default 0 and 1.
    Raises InputError for a folder without shards, a shard that is none, or a description that does not fit.
    """

    kind = "latents"
    dtype = np.float32

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        seed: int = 0,
        split: Split = "all",
        held_out: float = 0.05,
        vocabulary: Vocabulary | None = None,
        words: int | None = None,
        caption_length: int = 40,
        flip: bool = False,
    ) -> None:
        self.path, self.seed = Path(path), seed
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise InputError(f"path: expected a folder of *.safetensors shards, got none in {str(path)!r}")
        self._shards = [_Shard(file) for file in files]
        first, *others = ({name: tuple(e["shape"][1:]) for name, e in s.tensors.items()} for s in self._shards)
        # Of every tensor: features that each shard pads to a length of its own would fail where two meet in a batch.
        if other := next((found for found in others if found != first), None):
            raise InputError(f"{path}: expected shards of the same tensors, of one shape each, got {first} and {other}")
        shape = first["latents"]
        self.description = _description(self.path, shape)
        per_channel = (-1, *[1] * (len(shape) - 1))
        self._mean = np.array(self.description["mean"], dtype=np.float32).reshape(per_channel)
        self._scale = 1 / np.array(self.description["std"], dtype=np.float32).reshape(per_channel)
        self._mirror = next((name for name in _FLIPPED if name in first), None)
        if flip and self._mirror is None:
            raise InputError(f"flip: expected latents of the mirrored images in {path}, got none")
        self._extras = [name for name in ("features", "pooled") if name in first]
        self._rows = [(number, row) for number, shard in enumerate(self._shards) for row in range(shard.count)]
        labels = [-1] * len(self._rows)
        if "labels" in first:
            labels = [int(label) for shard in self._shards for label in shard.column("labels")]
        classes = self.description["classes"] or numbered_classes(labels, str(path))
        if max(labels) >= len(classes):
            raise InputError(f"{path}: expected labels below {len(classes)}, the classes described, got {max(labels)}")
        super().__init__(
            keys=[f"{self._shards[number].path.name}/{row}" for number, row in self._rows],
            captions=[caption for shard in self._shards for caption in _captions(shard)],
            labels=labels,
            classes=classes,
            order_key=f"latent shards {seed}",
            shape=shape,
            split=split,
            held_out=held_out,
            vocabulary=vocabulary,
            words=words,
            caption_length=caption_length,
            flip=flip,
            cache_bytes=0,
            groups=[number for number, _ in self._rows],
        )

    @property
    def latent_factor(self) -> int | None:
        """Pixels on a side of a latent cell, as described."""
        factor: int | None = self.description["latent_factor"]
        return factor

    @functools.cached_property
    def sha256(self) -> str:
        """Identity: layout of every shard, description, captions, labels, seed and vocabulary; not the numbers."""
        shards = [(shard.path.name, shard.sha256) for shard in self._shards]
        told = (self._settings(), self.seed, shards, self.description, self.names, self.captions, self.labels.tolist())
        return hashlib.sha256(repr(told).encode()).hexdigest()

    def batch(self, start: int, count: int) -> ImageBatch:
        """Samples at places `start` to ``start + count - 1``, with the text encoder's features where there are such."""
        batch = super().batch(start, count)
        places = [self._rows[self.chosen[sample]] for sample in self._order.samples(start, count)]
        extras = {
            name: np.stack([self._shards[shard].row(name, row) for shard, row in places]) for name in self._extras
        }
        return ImageBatch(batch.images, batch.captions, batch.tokens, batch.labels, **extras)

    def _read(self, sample: int, name: str = "latents") -> NDArray[np.float32]:
        shard, row = self._rows[self.chosen[sample]]
        latent: NDArray[np.float32] = (self._shards[shard].row(name, row) - self._mean) * self._scale
        return latent

    def _mirrored(self, sample: int) -> NDArray[np.float32]:
        assert self._mirror is not None
        return self._read(sample, self._mirror)


def _description(path: Path, shape: Sequence[int]) -> dict[str, Any]:
    file = path / DESCRIPTION
    found: dict[str, Any] = {"mean": [0.0] * shape[0], "std": [1.0] * shape[0], "classes": [], "latent_factor": None}
    if not file.exists():
        return found
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        if told.get("format") != 1:
            raise ValueError(f"format {told.get('format')!r}")
        found |= {name: told[name] for name in found if name in told}
        if not all(map(_finite, [*found["mean"], *found["std"]])):
            raise ValueError(f"mean {found['mean']} and std {found['std']}, which are not all finite numbers")
        if len(found["mean"]) != shape[0] or len(found["std"]) != shape[0] or min(found["std"]) <= 0:
            raise ValueError(f"mean {found['mean']} and std {found['std']} for {shape[0]} channels")
        classes, factor = found["classes"], found["latent_factor"]
        if classes is not None and not isinstance(classes, list):
            raise ValueError(f"classes {classes!r}, which are no list of names")
        if factor is not None and not (_finite(factor) and factor >= 1):
            raise ValueError(f"latent_factor {factor!r}, which is no number of at least 1")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{file}: expected a description of format 1, got {error}") from error
    return found


def _finite(value: Any) -> bool:
    """Whether a value from JSON is a number that float32 holds."""
    return isinstance(value, (int, float)) and abs(value) < 1e38


def _captions(shard: _Shard) -> list[str]:
    file = shard.path.with_suffix(".captions.jsonl")
    if not file.exists():
        return [""] * shard.count
    try:
        with open(file, encoding="utf-8") as lines:  # which end at "\n"; splitlines ends them inside some captions too
            captions = [json.loads(line) for line in lines]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: expected one JSON string a line, got {error}") from error
    if len(captions) != shard.count or not all(isinstance(caption, str) for caption in captions):
        raise InputError(f"{file}: expected {shard.count} captions, got {len(captions)} lines")
    return captions


def write_latents(
    folder: str | os.PathLike[str],
    pieces: Iterable[Mapping[str, NDArray[Any]]],
    *,
    captions: Iterable[Sequence[str]] | None = None,
    latent_factor: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] = (),
) -> list[Path]:
    """Write shards as `LatentShards` reads them, one for each piece.

    pieces: tensors by name as above; each piece may be made when it is asked for.
    captions: of each piece, one for each of its latents.
    latent_factor, mean, std, classes: for the description, which is written first.

    Returns the shards. A shard that is cut short by an interruption is none: it has its name when it is whole.
    Raises InputError where the folder holds shards already, or cannot be written, or a piece lacks captions.
    """
    import safetensors.numpy

    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: expected a folder to write to, got {error.strerror}") from error
    if any(path.glob("*.safetensors")):
        raise InputError(f"{path}: expected a folder without shards, got some")
    # First: without it what an interruption leaves would be read at another scale, and nobody would know.
    described: dict[str, Any] = {"latent_factor": latent_factor, "classes": list(classes)}
    described |= {name: list(map(float, given)) for name, given in (("mean", mean), ("std", std)) if given is not None}
    write_json(path / DESCRIPTION, {"format": 1} | {n: v for n, v in described.items() if v is not None})
    written: list[Path] = []
    told = iter(captions) if captions is not None else None
    for number, piece in enumerate(pieces):
        shard = path / f"latents-{number:05d}.safetensors"
        if told is not None:
            texts = next(told, ())
            if len(texts) != len(piece["latents"]):
                wanted = f"{len(piece['latents'])} for piece {number}, one for each of its latents"
                raise InputError(f"captions: expected {wanted}, got {len(texts)}")
            lines = "".join(json.dumps(caption) + "\n" for caption in texts)
            write_atomically(shard.with_suffix(".captions.jsonl"), lines.encode())
        write_atomically(shard, safetensors.numpy.save({n: np.ascontiguousarray(t) for n, t in piece.items()}))
        written.append(shard)
    return written
