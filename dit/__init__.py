"""Diffusion transformers: configure, count, build, train, sample and load.

The names below are imported when first used; ``DiTConfig`` and ``ditscale.dit.flops`` need no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig as DiTConfig
    from ditscale.dit.diffusion import DDPM as DDPM
    from ditscale.dit.diffusion import EDM as EDM
    from ditscale.dit.flow import RectifiedFlow as RectifiedFlow
    from ditscale.dit.model import DiT as DiT
    from ditscale.dit.sampling import draw_samples as draw_samples
    from ditscale.dit.training import TrainConfig as TrainConfig
    from ditscale.dit.training import train as train

_HOMES = {
    "DiT": "ditscale.dit.model",
    "DDPM": "ditscale.dit.diffusion",
    "DiTConfig": "ditscale.dit.config",
    "EDM": "ditscale.dit.diffusion",
    "RectifiedFlow": "ditscale.dit.flow",
    "TrainConfig": "ditscale.dit.training",
    "draw_samples": "ditscale.dit.sampling",
    "train": "ditscale.dit.training",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ditscale.dit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
