"""What a run knows of its data besides the images: words, classes and the scale of latents. ``data.json`` in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditscale.dit.data import Vocabulary
from ditscale.dit.files import read_json, write_json
from ditscale.errors import InputError

_FILE = "data.json"


@dataclass(frozen=True)
class RunData:
    """What is needed to speak to a trained model.

    Attributes:
        name: of the data.
        words: of the vocabulary, without its two special entries.
        classes: names of the labels.
        mean, std: of each channel, by which latents were scaled; empty where they were not.
    """

    name: str
    words: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @classmethod
    def of(cls, stream: Any) -> RunData:
        """What a stream tells."""
        described = getattr(stream, "description", {})
        mean, std = tuple(described.get("mean", ())), tuple(described.get("std", ()))
        return cls(stream.name, tuple(stream.vocabulary.words[2:]), tuple(stream.classes), mean, std)

    @classmethod
    def read(cls, run: Path) -> RunData | None:
        """From a run's folder, or the folder that a weights file lies in; None where there is none.

        Raises:
            InputError: the file is damaged.
        """
        path = (run if run.is_dir() else run.parent) / _FILE
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            return cls(content["name"], *(tuple(content[name]) for name in ("words", "classes", "mean", "std")))
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: expected what a run knows of its data, got a damaged file ({error})") from error

    def write(self, run: Path) -> None:
        """Into a run's folder."""
        content = {name: list(getattr(self, name)) for name in ("words", "classes", "mean", "std")}
        write_json(run / _FILE, {"name": self.name} | content)

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
