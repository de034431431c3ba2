"""Files that survive being killed at any moment: atomic writes, and a folder's lock. No torch."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ditscale.errors import InputError

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock; a second process there is not refused
    fcntl = None  # type: ignore[assignment]

# Bytes that are hashed at a time.
_PIECE = 1 << 20


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` so that a reader sees the old or the new content, whole, whatever happens."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        if path.is_dir():  # as the empty name is
            raise IsADirectoryError(errno.EISDIR, "a folder")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: expected a place to write, got {error.strerror or error}") from error


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes had begun to write into a folder and those in it; whoever asks holds its lock."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if path.name.split(".")[-2].isdecimal():  # as write_atomically calls them
            with contextlib.suppress(OSError):
                path.unlink()


def write_json(path: Path, value: Any) -> None:
    """:func:`write_atomically` of indented JSON; refuses NaN and infinity, which are no JSON."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file; InputError names the file and what is wrong with it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a JSON file, got {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file, got {error}") from error


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, read a piece at a time; OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def keep(path: Path | None, data: bytes) -> None:
    """:func:`write_atomically` into a cache: one that cannot be written is no harm, nor is none."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
    except (OSError, InputError):
        pass


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
