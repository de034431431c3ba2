"""Show again the step at which a run stopped because its loss or gradient was not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ditscale.dit.files import read_json
from ditscale.dit.rundata import RunData
from ditscale.dit.training.batches import Feeder, open_stream
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.execution import Execution
from ditscale.dit.training.ranks import Ranks
from ditscale.dit.training.state import TrainState
from ditscale.dit.training.step import Stepper
from ditscale.errors import InputError


def replay_step(folder: str | Path) -> dict[str, Any]:
    """Compute the next step of a run from its newest checkpoint, without taking it.

    A run that stopped as diverged left the weights with which its last step began.

    Args:
        folder: a run's folder with a checkpoint that one process or several wrote.

    Returns:
        "step"; "first_image", the place of the step's images in the data; "losses", one of each image;
        "gradient_norm"; and "largest_weight".

    Raises:
        InputError: the folder has no whole checkpoint, or the data are not what they were.
    """
    folder = Path(folder)
    config = TrainConfig.from_dict(read_json(folder / "config.json"))
    ranks = Ranks(Execution())
    state = TrainState(config, Execution(), ranks)
    found, complaints = state.restore(folder)
    if found is None:
        raise InputError(f"{folder}: expected a run with a whole checkpoint, got {complaints or 'none'}")
    stream, trained = open_stream(config, "train"), RunData.read(folder)
    if trained is not None:
        trained.check(RunData.of(stream), str(RunData.path(folder)))
    inputs = Feeder(config, stream, ranks)(state.step)
    stepper = Stepper(state.model, config.flow, state.updater, precision=config.precision)
    with torch.no_grad():
        losses = stepper.losses(inputs)
    _, norm = stepper.gradients(inputs)
    return {
        "step": state.step,
        "first_image": state.step * config.batch,
        "losses": losses.tolist(),
        "gradient_norm": float(norm),
        "largest_weight": max(float(p.detach().abs().max()) for p in state.model.parameters()),
    }
