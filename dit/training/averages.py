"""Power averages that a run keeps on the way, and averages of any width made of them afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ditscale.dit.average import Snapshot, reconstruction, snapshot_steps
from ditscale.dit.checks import need_whole
from ditscale.dit.files import write_atomically
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.state import TrainState
from ditscale.dit.update import whole
from ditscale.errors import InputError

_NAME = re.compile(r"step-(\d+)-width-(\d[\d.e-]*)\.safetensors")


def keep_averages(
    config: TrainConfig, state: TrainState, folder: Path, complain: Callable[[str, Exception], None]
) -> None:
    """Write the power averages into ``folder/averages`` where this step is one of those that are kept.

    ``complain`` hears of what cannot be written, and why.
    """
    if config.ema != "power" or state.step not in snapshot_steps(config.steps, config.ema_snapshots):
        return
    if not state.updater.updates:
        return  # all steps were skipped: an average of nothing
    for average in state.updater.averages:
        tensors = {name: whole(t).cpu() for name, t in state.updater.shared(average.weights).items()}
        if not state.ranks.first:
            continue
        # Profiles count updates: a skipped step is none.
        path = folder / "averages" / f"step-{state.updater.updates:09d}-width-{average.profile.value!r}.safetensors"
        try:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, safetensors.torch.save(tensors))
        except (InputError, OSError) as error:
            complain("average not kept", error)


def reconstruct(folder: str | Path, width: float, *, step: int | None = None) -> dict[str, Tensor]:
    """The power average of any relative width, made of those that a run has kept.

    Args:
        folder: a run's folder, trained with ``ema = "power"``.
        width: relative width, above 0 and up to 0.2886; best between the widths that were kept.
        step: after which update, at least 1. Default: the last kept.

    Returns:
        Weights by name, float32; summed in float64.

    Raises:
        InputError: the folder has no kept averages, or a damaged one, or the step is none or lies after all of them.
    """
    if step is not None:
        need_whole("step", step, 1)
    files = {}
    for path in sorted((Path(folder) / "averages").glob("*.safetensors")):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]):  # earlier versions kept averages of no step
            files[Snapshot(float(match[2]), int(match[1]))] = path
    if not files:
        raise InputError(f"{folder}: expected a run that kept averages (ema = 'power'), got none in averages/")
    wanted = Snapshot(width, max(s.step for s in files) if step is None else step)
    total: dict[str, Tensor] = {}
    for coefficient, path in zip(reconstruction(list(files), wanted), files.values(), strict=True):
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise InputError(f"{path}: expected kept averages, got {error}") from error
        for name, tensor in tensors.items():
            part = float(coefficient) * tensor.double()
            total[name] = total[name] + part if name in total else part
    return {name: tensor.to(torch.float32) for name, tensor in total.items()}
