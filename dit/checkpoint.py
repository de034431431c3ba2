"""Files that survive being killed at any moment: atomic writes, checksummed checkpoints, an append-only metrics log.

A checkpoint is two files: ``checkpoint-<step>.safetensors`` with every tensor, then ``checkpoint-<step>.json`` with the
scalar state and the SHA-256 of the first. It exists once the second does. The two newest are kept, so that a damaged
one can be passed over for the one before it. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from ditscale.errors import InputError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock; a second process there is not refused
    fcntl = None  # type: ignore[assignment]

_KEPT = 2


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` so that a reader sees the old or the new content, whole, whatever happens."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: expected a place to write, got {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """:func:`write_atomically` of indented JSON; refuses NaN and infinity, which are no JSON."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file; InputError names the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: expected a JSON file, got {error}") from error


@contextlib.contextmanager
def folder_lock(folder: Path, *, wait_seconds: float = 10.0) -> Iterator[None]:
    """Hold a folder for one process; the system lets go of it when the process ends, however it ends.

    Args:
        folder: made where it is not there.
        wait_seconds: how long to wait for another process to let go, as one does whose parent was killed a moment
            ago. Default: 10.

    Raises:
        InputError: another process holds it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - closed below, after the lock's life
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to, got {error.strerror or error}") from error
    with file:
        deadline = time.monotonic() + wait_seconds
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    message = f"{folder}: expected a folder that no other process uses, got one in use"
                    raise InputError(message) from error
                time.sleep(0.05)
        yield


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on.

    Attributes:
        step: optimizer steps done.
        tensors: by name, on the CPU.
        state: scalars, as JSON values.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then drop all but the two newest."""
    data = safetensors.torch.save({k: t.detach().contiguous() for k, t in checkpoint.tensors.items()})
    body = folder / f"checkpoint-{checkpoint.step:09d}.safetensors"
    write_atomically(body, data)
    head = {"step": checkpoint.step, "sha256": hashlib.sha256(data).hexdigest(), "state": checkpoint.state}
    write_json(body.with_suffix(".json"), head)
    for old in _steps(folder)[_KEPT:]:
        _remove(folder, old)


def load_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None, and a sentence for every damaged one that was passed over."""
    complaints = []
    for step in _steps(folder):
        head_path = folder / f"checkpoint-{step:09d}.json"
        try:
            head = read_json(head_path)
            data = head_path.with_suffix(".safetensors").read_bytes()
            if hashlib.sha256(data).hexdigest() != head["sha256"]:
                raise InputError("expected the checksum in its header, got another: truncated or altered")
            tensors = safetensors.torch.load(data)
            return Checkpoint(head["step"], tensors, head["state"]), complaints
        except (InputError, OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
            complaints.append(
                f"{head_path.with_suffix('.safetensors')}: damaged ({error}); falling back to the one before"
            )
    return None, complaints


def remove_checkpoints(folder: Path) -> None:
    """Delete every checkpoint of a finished run."""
    for step in _steps(folder):
        _remove(folder, step)


def _steps(folder: Path) -> list[int]:
    found = []
    for path in folder.glob("checkpoint-*.json"):
        with contextlib.suppress(ValueError):
            found.append(int(path.stem.removeprefix("checkpoint-")))
    return sorted(found, reverse=True)


def _remove(folder: Path, step: int) -> None:
    # The header goes first: without it the tensors are no checkpoint, so a kill in between leaves none half there.
    for ending in (".json", ".safetensors"):
        (folder / f"checkpoint-{step:09d}{ending}").unlink(missing_ok=True)


class MetricsLog:
    """One JSON object a line, appended and flushed.

    Args:
        path: the file.
        keep_to_step: lines after this step, and a last line cut short, are dropped when a run goes on from a
            checkpoint, so that the file reads as if the run had never stopped.
    """

    def __init__(self, path: Path, *, keep_to_step: int) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= keep_to_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def append(self, row: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics log; a line that is no JSON object with a step (cut short by a kill) is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows
