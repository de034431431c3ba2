"""The learning rates: of each parameter under muP, and over the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ditscale.dit.model import DiT
from ditscale.dit.mup import hidden_matrices
from ditscale.errors import InputError


def parameter_groups(model: DiT, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for AdamW with the learning rates of the maximal update parametrisation.

    Matrices whose input grows with the width learn at ``lr * base_width / width``; everything whose input does not
    (patch and time features, tables, biases, norms) learns at ``lr``; see
    :mod:`ditscale.dit.mup`. Without ``mup_base_width`` there is one
    rate. Source: arXiv:2203.03466, table 3 (Adam); for DiT arXiv:2505.15270.

    Args:
        model: the model; its configuration holds the base width.
        lr: learning rate at the base width.
        weight_decay: of the matrices whose input grows with the width, with muP and without. Layers fed by something of
            fixed width (:data:`ditscale.dit.mup.INPUT_LAYERS`), tables, biases and norms have none. Default: 0.0.
    """
    config = model.config
    scale = 1.0 if config.mup_base_width is None else config.mup_base_width / config.width
    slowed = hidden_matrices(model)
    fixed: list[Tensor] = []
    hidden: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (hidden if name in slowed else fixed).append(parameter)
    return [
        {"params": hidden, "lr": lr * scale, "weight_decay": weight_decay},
        {"params": fixed, "lr": lr, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant, then a fall to zero; lengths in steps.

    Args:
        steps: the whole run.
        warmup: steps of linear rise.
        decay: steps of the fall at the end; equal to ``steps - warmup`` for a fall from the start.
        shape: of the fall, "linear" or "cosine". Default: "linear".
    """

    steps: int
    warmup: int
    decay: int
    shape: str = "linear"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine"):
            raise InputError(f"decay_shape: expected linear or cosine, got {self.shape!r}")
        if min(self.steps, self.warmup, self.decay) < 0 or self.warmup + self.decay > self.steps:
            raise InputError(
                f"schedule: expected warmup + decay <= steps, got {self.warmup} + {self.decay} > {self.steps}"
            )

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at step 0 .. steps - 1."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        left = self.steps - step
        if left > self.decay:
            return 1.0
        share = left / (self.decay + 1)
        return share if self.shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * share)
