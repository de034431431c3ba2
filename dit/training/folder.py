"""A run's folder: made the run's, known again, cleared where nothing was trained, and closed by the record."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

from ditscale.dit.checkpoint import remove_checkpoints
from ditscale.dit.files import file_sha256, read_json, write_json
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.record import RunRecord, check_record
from ditscale.errors import InputError

WEIGHTS = "weights.safetensors"
# What a run writes before its first step.
_FIRST_FILES, _FIRST_FOLDERS = ("config.json", "data.json", "metrics.jsonl"), ("tensorboard", "wandb")


def claim(folder: Path, config: TrainConfig, say: Callable[[str], None]) -> RunRecord | None:
    """Make the folder this run's, and return the record where it is done already.

    Raises:
        InputError: the folder is not empty and holds something else.
    """
    path = folder / "config.json"
    if not path.exists():
        foreign = [p.name for p in folder.iterdir() if p.name != ".lock" and not p.name.endswith(".tmp")]
        if foreign:
            raise InputError(
                f"{folder}: expected an empty folder or a run of this configuration, got {foreign[0]!r} in it"
            )
        write_json(path, config.to_dict())
    elif TrainConfig.from_dict(read_json(path)).run_id != config.run_id:
        raise InputError(f"{folder}: expected an empty folder or a run of this configuration, got another run's")
    record_path = folder / "run.json"
    if record_path.exists():
        try:
            record = check_record(record_path, config)
        except InputError as error:
            say(f"{error}; training this run again")
            record_path.unlink()
        else:
            _check_weights(folder / WEIGHTS, record, say)
            return record
    return None


def _check_weights(path: Path, record: RunRecord, say: Callable[[str], None]) -> None:
    """Say where a finished run's weights are not there, or not those that its record was written with."""
    if record["status"] != "finished":
        return
    expected = record.get("weights_sha256")  # records of earlier versions have none
    if not path.is_file():
        say(f"{path}: expected the weights of this finished run, got none")
    elif expected is not None and file_sha256(path) != expected:
        say(f"{path}: expected the weights of this finished run, got others")


def clear(folder: Path) -> None:
    """Remove what a run writes before it has done a step."""
    remove_checkpoints(folder)  # of step 0, which diverged
    for name in _FIRST_FILES:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    for name in _FIRST_FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def settle(folder: Path, record: RunRecord) -> None:
    """Write the record, which is what makes a run finished. A diverged run keeps its checkpoint, to look into."""
    write_json(folder / "run.json", record)
    if record["status"] == "finished":
        remove_checkpoints(folder)
