"""Reading run tables: CSV, JSON lines, JSON, Parquet, trackers' files and exports, study folders."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError
from ditscale.scaling.trackers import flatten, has_records, read_trackio, unpack

# A law is fitted to finished runs; a longer file is a log of steps and must be reduced to one row a run first.
MAX_ROWS = 50_000
# A JSON document is read as a whole.
MAX_JSON_BYTES = 128 * 2**20
_SAMPLE = 65_536
_PACKED = {
    b"\x1f\x8b": "a gzip file; unpack it first",
    b"PK\x03\x04": "a zip archive or a spreadsheet; export it as CSV",
    b"\x28\xb5\x2f\xfd": "a zstandard file; unpack it first",
}

Columns = dict[str, list[Any]]


def read_columns(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    """Columns by name, and each row's number in the source (a file's line, or the record's place).

    Raises:
        InputError: no such file, not a table, no rows, duplicate columns, too many rows.
    """
    if path.is_dir():
        return _from_records(_study_records(path), str(path))
    if not path.exists():
        raise InputError(f"{path}: expected a file or a study folder, got nothing there")
    suffix = path.suffix.lower()
    try:
        begins = b""
        if path.is_file():  # what a pipe holds can be read once
            with path.open("rb") as stream:
                begins = stream.read(16)
        if begins.startswith(b"SQLite format 3"):
            return _from_records(read_trackio(path, MAX_ROWS), str(path))
        if suffix in (".parquet", ".pq") or begins.startswith(b"PAR1"):
            return _parquet(path)
        for magic, kind in _PACKED.items():
            if begins.startswith(magic):
                raise InputError(f"{path}: expected a table as text (CSV, JSON lines) or Parquet, got {kind}")
        if suffix in (".jsonl", ".ndjson"):
            return _json_lines(path)
        if suffix == ".json":
            return _json(path)
        return _csv(path)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise InputError(
            f"{path}: expected a text table (CSV or JSON lines), got bytes that are no UTF-8 text"
        ) from None


def _csv(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        # A pipe, such as /dev/stdin behind one, can be read only once.
        stream = file if file.seekable() else io.StringIO(file.read(MAX_JSON_BYTES), newline="")
        sample = stream.read(_SAMPLE)
        if not sample.strip():
            raise InputError(f"{path}: expected a table with a header line, got an empty file")
        if "\0" in sample:
            raise InputError(f"{path}: expected a text table (CSV or JSON lines), got binary data")
        stream.seek(0)
        head = sample.lstrip().splitlines()[0]
        delimiter = max(",\t;", key=head.count)
        reader = csv.reader(stream, delimiter=delimiter)
        try:
            header = [name.strip() for name in next(row for row in reader if any(cell.strip() for cell in row))]
            _check_header(path, header, delimiter)
            cells: list[list[str]] = [[] for _ in header]
            lines: list[int] = []
            for row in reader:
                if not row or (len(row) == 1 and not row[0].strip()):
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}: expected {len(header)} cells in line {reader.line_num}, as the header has, "
                        f"got {len(row)}"
                    )
                if len(lines) >= MAX_ROWS:
                    raise InputError(_too_many(path))
                lines.append(reader.line_num)
                for column, cell in zip(cells, row, strict=True):
                    column.append(cell)
        except csv.Error as error:
            raise InputError(f"{path}: expected a CSV table, got {error} in line {reader.line_num}") from None
    if not lines:
        raise InputError(f"{path}: expected at least one row below the header, got none")
    columns = {name: _numbers(column) for name, column in zip(header, cells, strict=True)}
    return _unpacked(columns, np.array(lines), path)


def _unpacked(columns: Columns, rows: NDArray[np.int64], path: Path) -> tuple[Columns, NDArray[np.int64]]:
    """A table whose cells hold whole configs (wandb's runs as pandas writes them) with one column a setting."""
    if not has_records(columns):
        return columns, rows
    return _from_records(unpack(columns, rows, str(path)), str(path))[0], rows


def _check_header(path: Path, header: list[str], delimiter: str) -> None:
    if len(header) < 2:
        raise InputError(f"{path}: expected a CSV table of several columns, got the header {header[0][:60]!r}")
    seen: set[str] = set()
    for name in header:
        if name in seen and name:
            raise InputError(f"{path}: expected every column name once, got {name!r} twice")
        seen.add(name)
    if all(_number(name) is not None for name in header):
        raise InputError(
            f"{path}: expected a header line with column names, got the numbers {delimiter.join(header)[:60]!r}"
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _numbers(cells: list[str]) -> list[Any]:
    """A column of numbers where every cell is a number or empty, else the text."""
    values: list[Any] = []
    for cell in cells:
        text = cell.strip()
        value = _number(text) if text else None
        if text and value is None:
            return [c if _number(c.strip() or "x") is None else float(c) for c in cells]
        values.append(value)
    return values


def _json_lines(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    records: list[Mapping[str, Any]] = []
    lines: list[int] = []
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(
                    f"{path}: expected a JSON object in line {number}, got {line.strip()[:60]!r}"
                ) from None
            if not isinstance(record, dict):
                raise InputError(f"{path}: expected a JSON object in line {number}, got {type(record).__name__}")
            if len(records) >= MAX_ROWS:
                raise InputError(_too_many(path))
            records.append(record)
            lines.append(number)
    columns, _ = _from_records(records, str(path))
    return columns, np.array(lines)


def _json(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(
            f"{path}: expected at most {MAX_JSON_BYTES // 2**20} MiB of JSON, one object a finished run, got "
            f"{path.stat().st_size // 2**20} MiB; reduce a log of steps to its final losses first"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected JSON, got {error}") from None
    if isinstance(value, dict):
        for key in ("runs", "data", "records"):
            if isinstance(value.get(key), list):
                value = value[key]
                break
    if isinstance(value, dict) and value and all(isinstance(v, list) for v in value.values()):
        sizes = {len(v) for v in value.values()}
        if len(sizes) != 1:
            raise InputError(f"{path}: expected columns of one length, got lengths {sorted(sizes)}")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(r, dict) for r in value):
        raise InputError(f"{path}: expected a list of runs (JSON objects), got {type(value).__name__}")
    if len(value) > MAX_ROWS:
        raise InputError(_too_many(path))
    return _from_records(value, str(path))


def _parquet(path: Path) -> tuple[Columns, NDArray[np.int64]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        if file.metadata.num_rows > MAX_ROWS:
            raise InputError(_too_many(path))
        table = file.read()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: expected a Parquet file, got {str(error).splitlines()[0][:120]}") from None
    names = table.column_names
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path}: expected every column name once, got {name!r} twice")
    if table.num_rows == 0:
        raise InputError(f"{path}: expected at least one row, got none")
    return _unpacked({n: table.column(n).to_pylist() for n in names}, np.arange(1, table.num_rows + 1), path)


def _from_records(records: Sequence[Mapping[str, Any]], source: str) -> tuple[Columns, NDArray[np.int64]]:
    """Columns of nested records, and the records' places, counted from 1."""
    if not records:
        raise InputError(f"{source}: expected at least one run, got none")
    flat = [flatten(r) for r in records]
    names = dict.fromkeys(name for r in flat for name in r)
    return {n: [r.get(n) for r in flat] for n in names}, np.arange(1, len(flat) + 1)


def _study_records(folder: Path) -> list[Mapping[str, Any]]:
    files = sorted(folder.glob("runs/*/run.json")) or sorted(folder.glob("*/run.json"))
    if not files:
        raise InputError(f"{folder}: expected a study folder with runs/*/run.json, got none")
    records: list[Mapping[str, Any]] = []
    for file in files:
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{file}: expected a run record (JSON), got {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"{file}: expected a run record (JSON object), got {type(record).__name__}")
        if record.get("role", "fit") == "fit" and record.get("status", "finished") == "finished":
            records.append(record)
    if not records:
        raise InputError(f"{folder}: expected at least one finished run with role fit, got {len(files)} other records")
    return records


def _too_many(path: Path) -> str:
    return (
        f"{path}: expected at most {MAX_ROWS:,} rows, one a finished run, got more; "
        "reduce a log of steps to its final losses first"
    )
