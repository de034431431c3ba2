"""What a run knows of its data besides the images: words, classes and the scale of latents.

``data.json`` in its folder; a file of exported weights has it in its header.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditscale.dit.data import Vocabulary
from ditscale.dit.files import read_json, write_json
from ditscale.dit.weights import read_data
from ditscale.errors import InputError

_FILE = "data.json"
_FIELDS = ("words", "classes", "mean", "std")


@dataclass(frozen=True)
class RunData:
    """What is needed to speak to a trained model, and to go on training it.

    Attributes:
        name: of the data.
        words: of the vocabulary, without its two special entries.
        classes: names of the labels.
        mean, std: of each channel, by which latents were scaled; empty where they were not.
        samples: how many it was trained on; None where they never repeat, or an earlier version did not write it.
    """

    name: str
    words: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    samples: int | None = None

    @classmethod
    def of(cls, stream: Any) -> RunData:
        """What a stream tells."""
        described = getattr(stream, "description", {})
        mean, std = tuple(described.get("mean", ())), tuple(described.get("std", ()))
        words, classes = tuple(stream.vocabulary.words[2:]), tuple(stream.classes)
        return cls(stream.name, words, classes, mean, std, stream.unique_images)

    @classmethod
    def read(cls, run: Path) -> RunData | None:
        """From a run's folder, or of a weights file: its header, else the folder that it lies in; None where there is none.

        Raises:
            InputError: the file is damaged.
        """
        path, content = run, read_data(run) if run.is_file() else None
        if content is None:
            path = cls.path(run if run.is_dir() else run.parent)
            if not path.is_file():
                return None
            content = read_json(path)
        try:
            fields = {name: tuple(content[name]) for name in _FIELDS}
            return cls(content["name"], **fields, samples=content.get("samples"))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: expected what a run knows of its data, got a damaged file ({error})") from error

    def write(self, run: Path) -> None:
        """Into a run's folder."""
        write_json(self.path(run), self.to_dict())

    @staticmethod
    def path(run: Path) -> Path:
        """The file in a run's folder."""
        return run / _FILE

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"name": self.name} | {name: list(getattr(self, name)) for name in _FIELDS} | {"samples": self.samples}

    def check(self, now: RunData, place: str, fields: Iterable[str] = (*_FIELDS, "samples")) -> None:
        """Raise InputError, which begins with ``place``, where a field of what the data tell now is not as it was."""
        for field in fields:
            before, came = getattr(self, field), getattr(now, field)
            if before != came and not (field == "samples" and before is None):
                told = "others" if field != "samples" else f"{came} instead of {before}"
                raise InputError(
                    f"{place}: expected the {field} of the data that the run was trained on, got {told} from {now.name}; "
                    "bring the data back as they were, or train another run on the new ones"
                )

    @property
    def vocabulary(self) -> Vocabulary:
        """The words, numbered as the model knows them."""
        return Vocabulary(self.words)

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents [n, C, ...] as the autoencoder gave them."""
        if not self.mean:
            return latents
        shape = (-1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(v, device=latents.device).view(shape) for v in (self.mean, self.std))
        return latents * std + mean
