"""Checksummed checkpoints and an append-only metrics log, both of which survive being killed at any moment.

A checkpoint is a directory ``checkpoint-<step>`` of safetensors files, then ``checkpoint-<step>.json`` with the scalar
state, the SHA-256 of each of them and its own. It exists once the header does. The two newest are kept, so that a damaged
one can be passed over for the one before it. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from ditscale.dit.files import file_sha256, read_json, write_atomically, write_json
from ditscale.errors import InputError

_KEPT = 2
_FILE = "tensors.safetensors"
_ENTRIES = ("step", "files", "state")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files are whole.

    Attributes:
        step: optimizer steps done.
        state: scalars, as JSON values.
        directory: holds its tensors, as safetensors files.
    """

    step: int
    state: dict[str, Any]
    directory: Path

    @property
    def one_file(self) -> bool:
        """Whether one process wrote it."""
        return (self.directory / _FILE).is_file()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, on the CPU; for a checkpoint that one process wrote."""
        return safetensors.torch.load_file(self.directory / _FILE)


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write a checkpoint of one process, then drop all but it and the newest other one.

    Raises:
        InputError: it cannot be written; those before it are as they were.
    """
    directory = begin_checkpoint(folder, step)
    data = safetensors.torch.save({name: t.detach().contiguous() for name, t in tensors.items()})
    try:
        write_atomically(directory / _FILE, data)
        end_checkpoint(folder, step, {_FILE: hashlib.sha256(data).hexdigest()}, state)
    except InputError:
        discard_checkpoint(folder, step)
        raise


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty directory for the tensors of a checkpoint, which is none until :func:`end_checkpoint`."""
    directory = folder / _name(step)
    try:
        _remove(folder, step)
        directory.mkdir()
    except OSError as error:
        raise InputError(f"{directory}: expected a place to write, got {error.strerror or error}") from error
    return directory


def end_checkpoint(folder: Path, step: int, sha256: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Make a checkpoint of what lies in its directory, whose files have these checksums; drop all but it and the newest other."""
    head = {"step": step, "files": dict(sha256), "state": dict(state)}
    write_json(folder / f"{_name(step)}.json", head | {"sha256": _digest(head)})
    others = [other for other in _steps(folder) if other != step]
    remove_checkpoints(folder, keep=[step, *others[: _KEPT - 1]])


def discard_checkpoint(folder: Path, step: int) -> None:
    """Remove what a save that failed has written."""
    with contextlib.suppress(OSError):
        _remove(folder, step)


def newest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, or None, and a sentence for every damaged one that was passed over."""
    found, damaged = None, []
    for step in _steps(folder):
        try:
            found = whole_checkpoint(folder, step)
            break
        except InputError as error:
            damaged.append(f"{folder / _name(step)}: damaged ({error})")
    instead = "none before it is whole" if found is None else f"falling back to the one of step {found.step}"
    return found, [f"{sentence}; {instead}" for sentence in damaged]


def whole_checkpoint(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step.

    Raises:
        InputError: there is none, or it is damaged.
    """
    directory = folder / _name(step)
    try:
        head = read_json(folder / f"{_name(step)}.json")
        body = {name: head[name] for name in _ENTRIES}
        # Headers had no checksum of their own at first.
        if head != body | ({"sha256": _digest(body)} if "sha256" in head else {}) or head["step"] != step:
            raise InputError("expected a header of this step with its checksum, got another: altered")
        files: dict[str, str] = head["files"]
        found = sorted(path.name for path in directory.glob("*.safetensors"))
        if found != sorted(files):
            raise InputError(f"expected the files {sorted(files)}, got {found}")
        for name, sha256 in files.items():
            if file_sha256(directory / name) != sha256:
                raise InputError(f"{name}: expected the checksum in its header, got another: truncated or altered")
        return Checkpoint(step, head["state"], directory)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"expected a whole checkpoint, got {error!r}") from error


def has_checkpoint(folder: Path, step: int) -> bool:
    """Whether the checkpoint of a step is there and whole."""
    try:
        whole_checkpoint(folder, step)
    except InputError:
        return False
    return True


def remove_later(folder: Path, found: Checkpoint | None) -> None:
    """Remove what a run that goes on from a checkpoint has no use for: damaged ones of later steps, and unfinished ones."""
    remove_checkpoints(folder, keep=[step for step in _steps(folder) if found is not None and step <= found.step])


def remove_checkpoints(folder: Path, keep: Collection[int] = ()) -> None:
    """Delete every checkpoint but those of some steps, and what is left of unfinished ones."""
    for step in {_step_of(path) for path in folder.glob("checkpoint-*")} - {None, *keep}:
        discard_checkpoint(folder, step)  # type: ignore[arg-type]


def _digest(head: Mapping[str, Any]) -> str:
    """The SHA-256 of a header's content, however it is laid out."""
    return hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()


def _name(step: int) -> str:
    return f"checkpoint-{step:09d}"


def _step_of(path: Path) -> int | None:
    digits = path.stem.removeprefix("checkpoint-")
    return int(digits) if digits.isdecimal() else None


def _steps(folder: Path) -> list[int]:
    found = [_step_of(path) for path in folder.glob("checkpoint-*.json")]
    return sorted((step for step in found if step is not None), reverse=True)


def _remove(folder: Path, step: int) -> None:
    # The header goes first: without it the tensors are no checkpoint, so a kill in between leaves none half there.
    (folder / f"{_name(step)}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / _name(step), ignore_errors=True)


class MetricsLog:
    """One JSON object a line, appended whole.

    Lines that cannot be written (a full disk) are said once, kept, and written with the next that can.

    Args:
        path: the file.
        keep_to_step: lines after this step, and a last line cut short, are dropped when a run goes on from a
            checkpoint, so that the file reads as if the run had never stopped.
        say: takes a sentence for a person.
    """

    def __init__(self, path: Path, *, keep_to_step: int, say: Callable[[str], None]) -> None:
        kept = [row for row in read_metrics(path) if row["step"] <= keep_to_step]
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._end = self._file.tell()
        self._waiting = b""
        self._say, self._said = say, False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line."""
        self._waiting += (json.dumps(row) + "\n").encode()
        try:
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)
            if not self._said:
                self._say(f"{self._file.name}: cannot be written ({error.strerror}); its lines wait")
                self._said = True
        else:
            self._end += len(self._waiting)
            self._waiting = b""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics log; a line that is no JSON object with a step (cut short by a kill) is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    rows.append(row)
    return rows
