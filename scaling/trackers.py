"""Runs as trackers keep them: trackio's own SQLite file, and tables whose cells hold a run's whole config or summary."""

from __future__ import annotations

import ast
import json
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ditscale.errors import InputError

# What a tracker groups a run's values under: settings first, for they win over a logged value of the same name.
SETTINGS = ("config",)
LOGGED = ("summary", "summary_metrics", "metrics")
# A Python dictionary's text has these for what JSON calls NaN and Infinity; literal_eval takes neither.
_NOT_LITERAL = re.compile(r"(?<=[:\[,\s])(-?)(nan|inf)(?=\s*[,\]}])")
_NUMBERS = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}


def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
    """A run's nested values by one name each.

    ``outer.inner`` for most; a tracker's ``config``, ``summary`` and ``metrics`` lose their prefix. Where a setting and a
    logged value share a name (the peak learning rate and the last one, say) the name means the setting, and the logged value
    keeps its prefix.
    """
    out: dict[str, Any] = {}
    logged: dict[str, tuple[str, Any]] = {}
    for key, value in record.items():
        if key in SETTINGS and isinstance(value, Mapping):
            out.update(_inner(value, "", 1))
        elif key in LOGGED and isinstance(value, Mapping):
            logged.update({name: (key, v) for name, v in _inner(value, "", 1).items()})
        else:
            out.update(_inner({key: value}, "", 0))
    for name, (key, value) in logged.items():
        out[f"{key}.{name}" if name in out else name] = value
    return out


def _inner(record: Mapping[str, Any], prefix: str, depth: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and depth < 4:
            if set(value) == {"value"} or set(value) == {"value", "desc"}:  # wandb wraps config entries so
                out[name] = value["value"]
                continue
            out.update(_inner(value, f"{name}.", depth + 1))
        elif isinstance(value, bool):
            out[name] = str(value).lower()
        elif not isinstance(value, list):
            out[name] = value
        elif name == "guidance_interval":  # the one list that is a setting, by which runs may differ
            out[name] = str(value)
    return out


def has_records(columns: Mapping[str, list[Any]]) -> bool:
    """Whether some column holds dictionaries, or their text, in every cell that is not empty."""
    return any(_holds_records(cells) for cells in columns.values())


def unpack(columns: Mapping[str, list[Any]], rows: Any, source: str) -> list[dict[str, Any]]:
    """Rows as nested records, the text of dictionaries read.

    Raises:
        InputError: a tracker's column (config, summary, ...) holds what is no dictionary; names row and column.
    """
    read: dict[str, list[Any]] = {}
    for name, cells in columns.items():
        if not name:  # the index that pandas writes first
            continue
        read[name] = cells
        if not _holds_records(cells):
            continue
        values = [_record(cell) for cell in cells]
        bad = next((i for i, (v, c) in enumerate(zip(values, cells, strict=True)) if v is None and not _empty(c)), None)
        if bad is None:
            read[name] = values
        elif name in SETTINGS + LOGGED:
            raise InputError(
                f"{name}: expected JSON or a Python dictionary in row {rows[bad]} of {source}, got {cells[bad][:60]!r}"
            )
    return [{k: v for k, v in zip(read, row, strict=True) if v is not None} for row in zip(*read.values(), strict=True)]


def _empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _holds_records(cells: list[Any]) -> bool:
    full = [c for c in cells if not _empty(c)]
    return bool(full) and all(
        isinstance(c, Mapping) or (isinstance(c, str) and c.strip()[:1] == "{" and c.strip()[-1:] == "}") for c in full
    )


def _record(cell: Any) -> Mapping[str, Any] | None:
    if isinstance(cell, Mapping) or _empty(cell):
        return cell if isinstance(cell, Mapping) else None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(_NOT_LITERAL.sub(lambda m: m[1] + ("None" if m[2] == "nan" else "1e999"), cell))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, Mapping) else None


def read_trackio(path: Path, most: int) -> list[dict[str, Any]]:
    """One nested record a run of a trackio project's file: its config, and the last value of every metric.

    Args:
        path: the project's ``.db``, which may be in use.
        most: more runs than that are refused.

    Raises:
        InputError: the file is no trackio project, holds no runs or too many, or is damaged.
    """
    # While the file is written to, its newest rows stand in a second file beside it, which only "ro" reads.
    beside = path.with_name(path.name + "-wal").exists()
    uri = f"{path.absolute().as_uri()}?mode=ro{'' if beside else '&immutable=1'}"
    runs: dict[str, dict[str, Any]] = {}
    try:
        database = sqlite3.connect(uri, uri=True)
        try:
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "metrics" not in tables:
                raise InputError(f"{path}: expected a trackio project (a table metrics), got tables {sorted(tables)}")
            key = _key(database, "metrics")
            for run, name, step, text in database.execute(
                f"SELECT {key}, run_name, step, metrics FROM metrics ORDER BY step, id"
            ):
                record = runs.setdefault(str(run), {"run_id": run, "run_name": name, "step": step, "metrics": {}})
                record["step"] = step
                record["metrics"].update({k: v for k, v in _values(path, text).items() if v is not None})
                if len(runs) > most:
                    raise InputError(f"{path}: expected at most {most:,} runs, got more")
            if "configs" in tables:
                for run, text in database.execute(f"SELECT {_key(database, 'configs')}, config FROM configs"):
                    if str(run) in runs:
                        runs[str(run)]["config"] = _values(path, text)
        finally:
            database.close()
    except sqlite3.Error as error:
        raise InputError(f"{path}: expected a trackio project's SQLite file, got {error}") from None
    if not runs:
        raise InputError(f"{path}: expected at least one run with logged values, got none")
    return list(runs.values())


def _key(database: sqlite3.Connection, table: str) -> str:
    """The column that tells runs apart: names alone in files of older versions."""
    columns = {row[1] for row in database.execute(f"PRAGMA table_info({table})")}
    return "run_id" if "run_id" in columns else "run_name"


def _values(path: Path, text: Any) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected JSON objects of logged values, got {str(text)[:60]!r}")
    return {k: _NUMBERS.get(v, v) if isinstance(v, str) else v for k, v in values.items()}
