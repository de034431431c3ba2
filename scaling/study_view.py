"""What the page needs of a study's folder, read once, checked, and free of how the files are laid out."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.engine import Array

_RECORD_NUMBERS = ("flops", "images")
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Band:
    """A law and its 95 % interval at rising budgets, [n] each."""

    budget: Array
    value: Array
    low: Array
    high: Array


@dataclass(frozen=True)
class LawView:
    """``floor + coefficient * C ** exponent``, its parameters' 95 % intervals and its saved band where there are any."""

    coefficient: float
    exponent: float
    floor: float
    intervals: dict[str, list[float]]
    band: Band | None

    def __call__(self, budget: Any) -> Any:
        return self.floor + self.coefficient * np.asarray(budget, dtype=float) ** self.exponent


@dataclass(frozen=True)
class Optimum:
    """The minimum of one budget's isoFLOP curve; the curve is a polynomial in ``log(params / centre)``."""

    budget: float
    params: float
    data: float
    loss: float
    params_interval: list[float] | None
    data_interval: list[float] | None
    bracketed: bool
    coefficients: list[float] | None
    centre: float

    def curve(self, params: Array) -> Array:
        """The fitted loss at other sizes."""
        value = np.asarray(np.polyval(self.coefficients or [math.nan], np.log(params / self.centre)))
        at_minimum = np.polyval(self.coefficients or [math.nan], math.log(self.params / self.centre))
        # A curve may have been fitted to the logarithm of the loss; its height at the minimum tells.
        return value if abs(at_minimum - self.loss) <= 1e-6 * self.loss else np.exp(value)


@dataclass(frozen=True)
class Laws:
    """The fitted laws; any of them may be missing."""

    params: LawView | None
    data: LawView | None
    loss: LawView | None
    optima: list[Optimum]
    fitted_range: tuple[float, float] | None
    data_unit: str
    chosen: str | None
    weights: dict[str, float]
    scoreboard: list[dict[str, Any]]
    warnings: list[str]


@dataclass(frozen=True)
class Samples:
    """A run's sheet of generated images: one row or a grid, as it was saved."""

    record: dict[str, Any]
    png: bytes
    width: int
    height: int
    captions: list[str]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """A run's training log, [n] each; ``record`` is its finished record, or its plan while it trains."""

    record: dict[str, Any]
    flops: Array
    images: Array
    loss: Array
    finished: bool


@dataclass
class StudyView:
    """A study's folder.

    Attributes:
        folder: where it is.
        study: study.json.
        size: the column that counts a model's size in the laws.
        runs: finished records with a loss, by role, budget and size.
        diverged: records without a loss.
        planned: how many runs the grid has.
        curves: training logs.
        samples: sheets of generated images, smallest model first.
        laws, prediction, outcome: None where they are still to come.
        law_sha256: of the laws.json that lies there now.
        notes: what could not be read and was left out.
    """

    folder: Path
    study: dict[str, Any]
    size: str
    runs: list[dict[str, Any]]
    diverged: list[dict[str, Any]]
    planned: int
    curves: list[Curve]
    samples: list[Samples]
    laws: Laws | None
    prediction: dict[str, Any] | None
    outcome: dict[str, Any] | None
    law_sha256: str | None
    notes: list[str] = field(default_factory=list)

    @property
    def fitted(self) -> list[dict[str, Any]]:
        """The runs that laws are fitted to."""
        return [run for run in self.runs if run["role"] == "fit"]

    @property
    def predicted(self) -> dict[str, Any] | None:
        """The record of the run that was predicted, once it is there."""
        return next((run for run in self.runs if run.get("role") == "prediction"), None)

    @property
    def budgets(self) -> list[float]:
        """The fitted budgets, rising."""
        return sorted({float(run["budget"]) for run in self.fitted})

    def size_of(self, record: dict[str, Any]) -> float:
        """A run's size as the laws count it."""
        return _size_of(record, self.size)


def _size_of(record: dict[str, Any], column: str) -> float:
    return float(record.get(column) or record["params"])


def read_study(folder: str | Path) -> StudyView:
    """Read a study's folder, finished or not.

    Raises:
        InputError: no study's folder, or a damaged study, law, prediction, outcome or run record: each by
            its name.
    """
    folder = Path(folder)
    if not (folder / "study.json").is_file():
        raise InputError(f"{folder}: expected a study's folder (with study.json), got none")
    study = _read_object(folder / "study.json")
    raw_laws = _read_if_there(folder / "laws.json")
    notes: list[str] = []
    records = _records(folder)
    size = str((raw_laws or {}).get("size") or _default_size(records, study))
    grid = [row for row in study.get("grid", []) if isinstance(row, dict)]
    planned_budgets = {row.get("run_id"): row.get("budget") for row in grid}
    for record in records:
        record.setdefault("role", "fit")
        if not _positive(record.get("budget")):
            record["budget"] = planned_budgets.get(record["run_id"]) or record["flops"]
    done = [r for r in records if r["loss"] is not None]
    # "fit" sorts before "prediction", which is where the story ends.
    done.sort(key=lambda r: (str(r["role"]), float(r["budget"]), _size_of(r, size)))
    prediction = _read_numbers(folder / "prediction.json", "loss", "budget")
    planned = [*grid, {**prediction, "role": "prediction"}] if prediction else grid
    outcome = _read_numbers(folder / "outcome.json", "predicted_loss", "measured_loss")
    if outcome:
        # Worked out again: a page must not repeat a claim that its own numbers contradict.
        low, high = outcome["interval_95"]
        outcome["relative_error"] = outcome["measured_loss"] / outcome["predicted_loss"] - 1
        outcome["inside_interval"] = low <= outcome["measured_loss"] <= high
    return StudyView(
        folder=folder,
        study=study,
        size=size,
        runs=done,
        diverged=[r for r in records if r["loss"] is None],
        planned=len(grid),
        curves=_curves(folder, records, planned, notes),
        samples=_samples(folder, done, size, notes),
        laws=laws_view(raw_laws, folder / "laws.json") if raw_laws else None,
        prediction=prediction,
        outcome=outcome,
        law_sha256=hashlib.sha256((folder / "laws.json").read_bytes()).hexdigest() if raw_laws else None,
        notes=notes,
    )


def laws_view(raw: dict[str, Any], path: Path) -> Laws:
    """The laws of laws.json, as the page needs them; parts that are not there become None or empty.

    Raises:
        InputError: a part is there and cannot be understood.
    """
    try:
        isoflop = raw.get("isoflop") or {}
        backtest = raw.get("backtest") or {}
        ends = raw.get("fitted_range")
        optima = [_optimum(row) for row in isoflop.get("optima") or []]
        return Laws(
            params=_law(raw.get("N_opt") or isoflop.get("N_opt")),
            data=_law(raw.get("D_opt") or isoflop.get("D_opt")),
            loss=_law(raw.get("loss") or isoflop.get("loss")),
            optima=sorted(optima, key=lambda o: o.budget),
            fitted_range=(float(ends[0]), float(ends[1])) if ends else None,
            data_unit=str(raw.get("data_unit") or isoflop.get("data_unit") or "images"),
            chosen=str(raw["chosen"]) if raw.get("chosen") else None,
            weights={str(k): float(v) for k, v in (raw.get("weights") or {}).items()},
            scoreboard=list(backtest.get("scoreboard") or []),
            warnings=[str(w) for w in raw.get("warnings") or isoflop.get("warnings") or []],
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"{path}: expected fitted laws, got something else ({type(error).__name__}: {error})"
        ) from error


def _law(raw: dict[str, Any] | None) -> LawView | None:
    if not raw:
        return None
    band = raw.get("band")
    view = None
    if band:
        view = Band(*(np.asarray(band[k], dtype=float) for k in ("budget", "value", "low", "high")))
        if len({len(column) for column in (view.budget, view.value, view.low, view.high)}) > 1:
            raise ValueError("band: columns of different lengths")
        if len(view.budget) < 2:  # a law through as many points as it has parameters has no interval anywhere
            view = None
    # Nor do its parameters then: an end that is not finite is null in the file.
    known = {k: v for k, v in (raw.get("intervals") or {}).items() if v[0] is not None and v[1] is not None}
    intervals = {k: [float(v[0]), float(v[1])] for k, v in known.items()}
    return LawView(float(raw["coefficient"]), float(raw["exponent"]), float(raw.get("floor") or 0.0), intervals, view)


def _optimum(row: dict[str, Any]) -> Optimum:
    data = next(row[k] for k in ("data", "images", "tokens") if row.get(k) is not None)
    return Optimum(
        budget=float(row["budget"]),
        params=float(row["params"]),
        data=float(data),
        loss=float(row["loss"]),
        params_interval=row.get("params_interval"),
        data_interval=row.get("data_interval"),
        bracketed=bool(row.get("bracketed", True)),
        coefficients=[float(c) for c in row["coefficients"]] if row.get("coefficients") else None,
        centre=float(row.get("centre") or 1.0),
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    records, damaged = [], []
    for path in sorted((folder / "runs").glob("*/run.json")):
        try:
            records.append(_record(path))
        except InputError as error:
            damaged.append(str(error))
    if damaged:
        raise InputError("; ".join(damaged))
    return records


def _record(path: Path) -> dict[str, Any]:
    record = _read_object(path, "run_id", "status", "loss", "params", *_RECORD_NUMBERS)
    for name in (*_RECORD_NUMBERS, "params"):
        if not _positive(record[name]):
            raise InputError(f"{path}: expected a positive number of {name}, got {record[name]!r}")
    if record["loss"] is not None and not _positive(record["loss"]):
        raise InputError(f"{path}: expected a positive loss or null, got {record['loss']!r}")
    return record


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _default_size(records: list[dict[str, Any]], study: dict[str, Any]) -> str:
    if not records:
        return str((study.get("prior") or {}).get("of") or "params")
    return "params_per_token" if all(_positive(r.get("params_per_token")) for r in records) else "params"


def _curves(folder: Path, records: list[dict[str, Any]], grid: list[dict[str, Any]], notes: list[str]) -> list[Curve]:
    known = {row["run_id"]: (row, False) for row in grid if "run_id" in row}
    known |= {record["run_id"]: (record, True) for record in records}
    curves = []
    for path in sorted((folder / "runs").glob("*/metrics.jsonl")):
        if path.parent.name not in known:
            continue
        record, finished = known[path.parent.name]
        rows, bad = [], 0
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        for i, line in enumerate(lines):
            try:
                row = json.loads(line)
                rows.append((float(row["flops"]), float(row["images"]), float(row["train_loss"])))
            except (ValueError, KeyError, TypeError):
                # A run that was killed may leave half a line at the end; anywhere else it is damage.
                bad += i < len(lines) - 1
        if bad:
            notes.append(f"{path.relative_to(folder)}: {bad} damaged lines left out of the loss curves")
        values = np.array([row for row in rows if all(math.isfinite(v) and v > 0 for v in row)])
        if len(values) >= 2:
            curves.append(Curve(record, values[:, 0], values[:, 1], values[:, 2], finished))
    return curves


def _samples(folder: Path, records: list[dict[str, Any]], size: str, notes: list[str]) -> list[Samples]:
    sheets = []
    for record in records:
        path = folder / "runs" / record["run_id"] / "samples.png"
        if not path.is_file():
            continue
        png = path.read_bytes()
        if not png.startswith(_PNG) or len(png) < 24 or not png.rstrip(b"\n").endswith(b"IEND\xaeB`\x82"):
            notes.append(f"{path.relative_to(folder)}: expected a PNG image, got something else; left out")
            continue
        width, height = struct.unpack(">II", png[16:24])
        settings: dict[str, Any] = {}
        if path.with_suffix(".json").is_file():
            try:
                settings = _read_object(path.with_suffix(".json"))
            except InputError as error:
                notes.append(f"{error}; samples shown without captions")
        captions = [str(c) for c in settings.pop("captions", [])]
        sheets.append(Samples(record, png, width, height, captions, settings))
    sheets.sort(key=lambda s: (_size_of(s.record, size), s.record["flops"]))
    return sheets


def _read_if_there(path: Path) -> dict[str, Any] | None:
    return _read_object(path) if path.exists() else None


def _read_numbers(path: Path, *numbers: str) -> dict[str, Any] | None:
    """A file of a prediction or an outcome, its numbers and its interval checked."""
    content = _read_if_there(path)
    if content is None:
        return None
    for name in numbers:
        if not _positive(content.get(name)):
            raise InputError(f"{path}: expected a positive number of {name}, got {content.get(name)!r}")
    ends = content.get("interval_95")
    if not (isinstance(ends, list) and len(ends) == 2 and all(map(_positive, ends)) and ends[0] <= ends[1]):
        raise InputError(f"{path}: expected interval_95 to be two rising positive numbers, got {ends!r}")
    return content


def _read_object(path: Path, *needed: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON file, got {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got a {type(content).__name__}")
    missing = [name for name in needed if name not in content]
    if missing:
        raise InputError(f"{path}: expected the field {missing[0]!r}, got none: the file is damaged or from elsewhere")
    return content
