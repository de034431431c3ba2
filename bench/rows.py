"""Results as rows: one JSON object a line, complete in itself. Reading, writing and the fields that every row has. No torch."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ditscale.errors import InputError

SCHEMA = 1
Row = dict[str, Any]
# "measured"; "skipped" (time was up); "unavailable" (cannot run here); "noisy" (other work disturbed the rounds); "wrong" (failed
# the check, so it was not timed); "failed" (raised).
STATUSES = ("measured", "skipped", "unavailable", "noisy", "wrong", "failed")
REQUIRED = (
    "schema",
    "suite",
    "case",
    "op",
    "provider",
    "status",
    "device",
    "versions",
    "commit",
    "measured_at",
)
RESULTS = Path(__file__).resolve().parent / "results"


def read_rows(path: str | Path) -> list[Row]:
    """Read a JSONL file of rows.

    Raises:
        InputError: no such file, or a line is no row (says which).
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path}: expected a file of benchmark rows, got {error.strerror}") from error
    except UnicodeDecodeError:
        raise InputError(f"{path}: expected a file of benchmark rows, got bytes that are no UTF-8 text") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"{path}: expected one JSON object a line, got something else in line {number}") from None
        missing = [name for name in REQUIRED if not isinstance(row, dict) or name not in row]
        if missing or row["schema"] != SCHEMA:
            raise InputError(
                f"{path}: expected rows of schema {SCHEMA}, got a line {number} without {missing or 'that schema'}"
            )
        rows.append(row)
    return rows


def write_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write rows, all or nothing: the file appears when it is complete."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: expected a place to write results to, got {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def check_place(path: str | Path) -> None:
    """See before hours of measuring that rows can be written there; what is there stays.

    Raises:
        InputError: a folder, or a place that takes no file.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: expected a file to write results to, got a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path}: expected a place to write results to, got {error.strerror}") from error


def merge_rows(path: str | Path, rows: Iterable[Row]) -> Path:
    """Write rows into a file that may have some: what it has of the same cases goes, the rest stays, in its place.

    Raises:
        InputError: the file holds something else, or rows of another device.
    """
    path, new = Path(path), list(rows)
    old = read_rows(path) if path.exists() else []
    names = sorted({row["device"]["name"] for row in (*old, *new)})
    if len(names) > 1:
        raise InputError(f"{path}: expected rows of {names[0]}, got also some of {names[1]}: one file a device")
    cases = {row["case"] for row in new}
    return write_rows(path, [row for row in old if row["case"] not in cases] + new)


def measured(rows: Iterable[Row], **fields: Any) -> list[Row]:
    """The rows that hold a time, and have these fields."""
    return [r for r in rows if r["status"] == "measured" and all(r.get(k) == v for k, v in fields.items())]


def committed(folder: str | Path | None = None) -> list[Row]:
    """All rows under ``bench/results`` (or ``folder``), file by file."""
    found: list[Row] = []
    for path in sorted(Path(folder or RESULTS).glob("*.jsonl")):
        found += read_rows(path)
    return found
