"""Further places for metrics, each a small adapter. ``metrics.jsonl`` is always written; these only mirror it.

Who resumes a run continues its curves: each adapter names the run by its folder and its id.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ditscale.dit.training.config import TrainConfig
from ditscale.errors import InputError


class Sink(Protocol):
    """What the training loop tells."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after a step."""

    def picture(self, step: int, path: Path) -> None:
        """A PNG that was drawn after a step."""

    def close(self) -> None:
        """Nothing more comes."""


def open_sink(name: str, folder: Path, config: TrainConfig, step: int) -> Sink:
    """The adapter called ``name``, for a run that begins or goes on after ``step`` steps.

    Raises:
        InputError: its package is not installed.
    """
    adapters: dict[str, Callable[[Any, Path, TrainConfig, int], Sink]]
    adapters = {"tensorboard": Tensorboard, "wandb": Wandb, "trackio": Trackio}
    return adapters[name](sink_module(name), folder, config, step)


def sink_module(name: str) -> Any:
    """The module that the adapter called ``name`` speaks to; InputError where its package is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise InputError(f"execution.sinks: expected the package {name} to be installed, got none ({error})") from error


class Tensorboard:
    """Event files in the run's folder, under ``tensorboard/``."""

    def __init__(self, module: Any, folder: Path, config: TrainConfig, step: int) -> None:
        # What an interrupted session wrote beyond its last checkpoint is withdrawn.
        purge = step + 1 if step else None
        self._writer = module.SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as image:
            self._writer.add_image("samples", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class _Service:
    """The calls that wandb and trackio share. What they say goes to stderr: stdout may be a command's JSON."""

    def __init__(self, module: Any, config: TrainConfig, **settings: Any) -> None:
        self._module = module
        with contextlib.redirect_stdout(sys.stderr):
            self._run = module.init(config=config.to_dict(), resume="allow", **settings)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        self._run.log({"samples": self._module.Image(str(path))}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._run.finish()


class Wandb(_Service):
    """A run of Weights & Biases; project and mode by its own environment variables."""

    def __init__(self, module: Any, folder: Path, config: TrainConfig, step: int) -> None:
        super().__init__(module, config, id=config.run_id, name=folder.name, dir=str(folder))


class Trackio(_Service):
    """A run of trackio, in the project "ditscale"."""

    def __init__(self, module: Any, folder: Path, config: TrainConfig, step: int) -> None:
        super().__init__(module, config, project="ditscale", name=config.run_id)
