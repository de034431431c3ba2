"""The run table: one finished training run a row, columns with names and units, nothing pooled by accident."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError
from ditscale.scaling.engine import Array
from ditscale.scaling.readers import Columns, read_columns
from ditscale.scaling.schema import POOL_COLUMNS, RUN_COLUMNS, STEP_COLUMNS
from ditscale.scaling.where import evaluate

_WHICH_N = (
    "N is params, all of them; --params params_per_token takes those that work on every token, as studies' laws do"
)
_ROLES = ("params", "images", "tokens", "flops", "loss", "budget")


@dataclass(frozen=True)
class RunTable:
    """Runs as columns.

    Attributes:
        columns: every column by its own name; numbers as float64, text as objects.
        roles: role ("params", "images" or "tokens", "flops", "loss", "budget") -> column name.
        source: where the runs came from.
        rows: the line or record number of each row in the source, for messages.
        notes: what was done to the table since it was read (rows dropped, columns derived).
    """

    columns: Mapping[str, NDArray[Any]]
    roles: Mapping[str, str]
    source: str = "table"
    rows: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    notes: tuple[str, ...] = ()

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        params: str | None = None,
        images: str | None = None,
        tokens: str | None = None,
        flops: str | None = None,
        loss: str | None = None,
        budget: str | None = None,
        where: str | None = None,
        drop_highest: int = 0,
        tokens_from_6nd: bool = False,
        last_step: bool = False,
        pool: bool = False,
    ) -> RunTable:
        """Read runs from CSV, JSONL, JSON, Parquet, trackio's file, a wandb or trackio export, or a study folder.

        Rows that are equal in every column count once: they are one run, exported twice.

        Args:
            path: the file, or a study folder (its ``runs/*/run.json`` with role "fit" and status "finished").
            params: column of model sizes N in parameters. Default: "params" where there is one.
            images, tokens: column of training data D, in images or tokens; one of the two. Default: "images",
                then "tokens".
            flops: column of training compute in FLOPs. Default: "flops".
            loss: column of losses. Default: "loss".
            budget: column of nominal budgets in FLOPs. Default: "budget".
            where: keep the rows for which this expression holds, such as ``params > 1e7 and lr == 0.001``; a
                column whose name is no identifier stands in backticks.
            drop_highest: leave out this many rows of highest loss. Default: 0.
            tokens_from_6nd: derive D = C / (6 N), a language model's convention that is wrong for DiTs.
                Default: False.
            last_step: of a tracker's step log, with a column of runs and one of steps, keep each run's last value of
                every column. Default: False.
            pool: accept runs that differ in loss convention, schedule or data, and a step log's rows as runs of their
                own. Default: False.

        Raises:
            InputError: the file cannot be read; a column is missing or duplicated; a number is not one (names
                row and column); runs of different conventions, or steps of one run, would be pooled.
        """
        columns, rows = read_columns(Path(path))
        notes: list[str] = []
        if last_step or not pool:
            columns, rows = _one_row_a_run(columns, rows, str(path), notes, last_step=last_step, loss=loss or "loss")
        columns, rows = _without_copies(columns, rows, notes)
        return cls.from_columns(
            columns,
            params=params,
            images=images,
            tokens=tokens,
            flops=flops,
            loss=loss,
            budget=budget,
            where=where,
            drop_highest=drop_highest,
            tokens_from_6nd=tokens_from_6nd,
            pool=pool,
            source=str(path),
            rows=rows,
            notes=tuple(notes),
        )

    @classmethod
    def from_records(cls, records: Iterable[Mapping[str, Any]], **options: Any) -> RunTable:
        """Build from dictionaries, one a run; ``options`` as in :meth:`read`, without ``path``."""
        listed = [dict(r) for r in records]
        names = dict.fromkeys(k for r in listed for k in r)
        return cls.from_columns({n: [r.get(n) for r in listed] for n in names}, **options)

    @classmethod
    def from_columns(
        cls,
        columns: Mapping[str, Any],
        *,
        where: str | None = None,
        drop_highest: int = 0,
        tokens_from_6nd: bool = False,
        pool: bool = False,
        source: str = "table",
        rows: NDArray[np.int64] | None = None,
        notes: tuple[str, ...] = (),
        **roles: str | None,
    ) -> RunTable:
        """Build from arrays or lists by column name; the other arguments as in :meth:`read`."""
        unknown = set(roles) - set(_ROLES)
        if unknown:
            raise InputError(f"{sorted(unknown)[0]}: expected one of {', '.join(_ROLES)}")
        data = {str(k): np.asarray(_typed(v)) for k, v in columns.items()}
        sizes = {len(v) for v in data.values()}
        if not data or sizes == {0}:
            raise InputError(f"{source}: expected at least one run, got an empty table")
        if len(sizes) > 1:
            raise InputError(f"{source}: expected columns of one length, got lengths {sorted(sizes)}")
        named = _find_roles(data, roles, source)
        count = sizes.pop()
        table = cls(data, named, source, np.arange(1, count + 1) if rows is None else rows, notes)
        if where is not None:
            table = table.where(where)
        for role, column in named.items():
            table._positive(role, column)
        if drop_highest:
            table = table.drop_highest(drop_highest)
        if tokens_from_6nd:
            table = table.with_tokens_from_6nd()
        if roles.get("params") is None and named.get("params") == "params" and "params_per_token" in data:
            table = dataclasses.replace(table, notes=(*table.notes, _WHICH_N))
        if not pool:
            table.check_poolable()
        return table

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, role: str) -> Array:
        """The numbers of a role or of a column, checked to be positive and finite.

        Raises:
            InputError: there is none, or a value is not a positive number.
        """
        name = self.roles.get(role, role)
        if name not in self.columns:
            have = ", ".join(self.columns)
            raise InputError(f"{role}: expected a column of that name in {self.source}, got columns {have}")
        return self._positive(role, name)

    @property
    def params(self) -> Array:
        """Model sizes N."""
        return self.column("params")

    @property
    def data(self) -> Array:
        """Training data D, in :attr:`data_unit`."""
        if "images" not in self.roles and "tokens" not in self.roles:
            raise InputError(
                f"tokens: expected a column of images or tokens in {self.source}; name one with --images or "
                "--tokens, or derive it with --tokens-from-6nd"
            )
        return self.column(self.data_unit)

    @property
    def data_unit(self) -> str:
        """ "images" or "tokens"."""
        return "images" if "images" in self.roles else "tokens"

    @property
    def flops(self) -> Array:
        """Training compute C as measured by the ledger."""
        return self.column("flops")

    @property
    def loss(self) -> Array:
        """Losses."""
        return self.column("loss")

    @property
    def budgets(self) -> Array:
        """The nominal budget of every run: its column, else groups of nearly equal compute (within 25 %)."""
        if "budget" in self.roles:
            return self.column("budget")
        return cluster_budgets(self.flops)

    def has(self, role: str) -> bool:
        """Whether a role has a column."""
        return role in self.roles

    def take(self, index: Any, note: str | None = None) -> RunTable:
        """Some rows, by mask or index."""
        return dataclasses.replace(
            self,
            columns={k: v[index] for k, v in self.columns.items()},
            rows=self.rows[index],
            notes=self.notes + ((note,) if note else ()),
        )

    def where(self, expression: str) -> RunTable:
        """The rows for which a comparison holds; see :meth:`read`."""
        mask = evaluate(expression, self.columns, len(self))
        if not mask.any():
            raise InputError(f"where: expected {expression!r} to hold for at least one of {len(self)} rows, got none")
        return self.take(mask, f"kept {int(mask.sum())} of {len(self)} rows where {expression}")

    def drop_highest(self, count: int) -> RunTable:
        """Leave out the runs of highest loss."""
        if not 0 <= count < len(self):
            raise InputError(f"drop-highest: expected 0 to {len(self) - 1}, got {count}")
        keep = np.sort(np.argsort(self.loss, kind="stable")[: len(self) - count])
        return self.take(keep, f"dropped the {count} highest losses")

    def with_tokens_from_6nd(self) -> RunTable:
        """Add D = C / (6 N) in tokens. Over-counts an adaLN DiT by about 1.4; here for language-model tables."""
        column = self.flops / (6.0 * self.params)
        roles = {k: v for k, v in self.roles.items() if k not in ("images", "tokens")}
        return dataclasses.replace(
            self,
            columns={**self.columns, "tokens (C/6N)": column},
            roles={**roles, "tokens": "tokens (C/6N)"},
            notes=(*self.notes, "tokens derived as C/(6N)"),
        )

    def best_of_budgets(self) -> RunTable:
        """At every budget the run of least loss: the runs nearest to the compute-optimal path."""
        budgets = self.budgets
        best = [int(i[np.argmin(self.loss[i])]) for b in np.unique(budgets) for i in [np.flatnonzero(budgets == b)]]
        return self.take(np.sort(best), f"kept the run of least loss at each of {len(best)} budgets")

    def check_poolable(self, names: Sequence[str] = POOL_COLUMNS) -> None:
        """Refuse runs whose losses or schedules are not comparable.

        Args:
            names: columns of which each must have one value. Default: those of a loss's convention.

        Raises:
            InputError: names the column and two of its values.
        """
        for name in names:
            if name not in self.columns:
                continue
            values = self._at_odds(name)
            if values:
                raise InputError(
                    f"{name}: expected one value over all runs of {self.source}, got {values[0]!r} and "
                    f"{values[1]!r}; select with --where, or pool them on purpose with --pool"
                )

    def _at_odds(self, name: str) -> tuple[object, object] | None:
        """Two values of a column that should have one. Endless data shows other images to every seed: there, one a seed."""
        by_seed = name == "data_sha256" and "seed" in self.columns
        seeds = self.columns["seed"].tolist() if by_seed else [None] * len(self)
        first: dict[object, object] = {}
        for seed, value in zip(seeds, self.columns[name].tolist(), strict=True):
            if is_empty(value):
                continue
            if first.setdefault(seed, value) != value:
                return first[seed], value
        return None

    def _positive(self, role: str, name: str) -> Array:
        column = self.columns[name]
        label = role if role == name else f"{role} (column {name!r})"
        if column.dtype == object:
            for row, value in zip(self.rows, column, strict=True):
                if not isinstance(value, (int, float, np.number, Decimal)):
                    came = "an empty cell" if value is None or value == "" else repr(value)[:60]
                    raise InputError(f"{label}: expected a number in row {row} of {self.source}, got {came}")
        values = column.astype(float)
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            i = int(bad[0])
            raise InputError(
                f"{label}: expected a positive number in row {self.rows[i]} of {self.source}, got {values[i]:g}"
            )
        return values


def _one_row_a_run(
    columns: Columns, rows: NDArray[np.int64], source: str, notes: list[str], *, last_step: bool, loss: str
) -> tuple[Columns, NDArray[np.int64]]:
    """A step log reduced to each run's last values, or refused; any other table as it is."""
    run = next((name for name in RUN_COLUMNS if name in columns), None)
    step = next((name for name in STEP_COLUMNS if name in columns), None)
    if run is None or step is None:
        if last_step:
            raise InputError(
                f"last-step: expected a column of runs ({', '.join(RUN_COLUMNS)}) and one of steps "
                f"({', '.join(STEP_COLUMNS)}) in {source}, got columns {', '.join(columns)}"
            )
        return columns, rows
    names = [str(v) for v in columns[run]]
    if len(set(names)) == len(names):
        return columns, rows
    if not last_step:
        raise InputError(
            f"{run}: expected one row a run, got {len(names)} rows of {len(set(names))} runs in {source}; keep the last "
            "step of each with --last-step, or take every row as a run with --pool"
        )
    steps = [v if isinstance(v, (int, float)) and v == v else -1.0 for v in columns[step]]
    members: dict[str, list[int]] = {}
    for i in sorted(range(len(names)), key=steps.__getitem__):
        members.setdefault(names[i], []).append(i)
    # A tracker leaves a cell empty at the steps where a value was not logged.
    kept = {
        name: [next((v for i in reversed(m) if not is_empty(v := cells[i])), None) for m in members.values()]
        for name, cells in columns.items()
    }
    losses = (
        [[v for i in m if (v := columns[loss][i]) is not None] for m in members.values()] if loss in columns else []
    )
    # Where every run ends in NaN, its last row is one that never holds a loss.
    if any(log and log[-1] == log[-1] for log in losses):
        kept[loss] = [log[-1] if _diverged(log) else v for log, v in zip(losses, kept[loss], strict=True)]
    notes.append(f"kept the last step of each of {len(members)} runs, of {len(names)} rows")
    return kept, rows[[m[-1] for m in members.values()]]


def _diverged(log: list[Any]) -> bool:
    """Whether a run's losses were numbers and then NaN to the end; NaN between numbers stands for a step without a loss."""
    nan = [v != v for v in log]
    return nan == sorted(nan) and nan[-1:] == [True]


def is_empty(value: Any) -> bool:
    """Whether a cell holds nothing: None, no text, or NaN."""
    return value is None or value == "" or value != value


def _without_copies(columns: Columns, rows: NDArray[np.int64], notes: list[str]) -> tuple[Columns, NDArray[np.int64]]:
    seen: dict[tuple[str, ...], int] = {}
    for i, record in enumerate(zip(*columns.values(), strict=True)):
        seen.setdefault(tuple(map(repr, record)), i)
    if len(seen) == len(rows):
        return columns, rows
    keep = list(seen.values())
    notes.append(f"dropped {len(rows) - len(keep)} rows that copy another in every column: a run counts once")
    return {name: [cells[i] for i in keep] for name, cells in columns.items()}, rows[keep]


def cluster_budgets(flops: Array, *, tolerance: float = 0.25) -> Array:
    """Nominal budgets from measured compute: sorted runs are cut where the next costs over ``tolerance``
    more.

    Returns:
        The geometric mean of each run's group.
    """
    order = np.argsort(flops, kind="stable")
    cuts = np.flatnonzero(np.diff(np.log(flops[order])) > np.log1p(tolerance)) + 1
    budgets = np.empty(len(flops))
    for group in np.split(order, cuts):
        budgets[group] = np.exp(np.log(flops[group]).mean())
    return budgets


def _typed(values: Any) -> NDArray[Any]:
    """Numbers as float64 where every cell is one (None as NaN), else the cells as they came."""
    if isinstance(values, np.ndarray) and values.dtype != object:
        return values.astype(float) if values.dtype.kind in "iufb" else values.astype(object)
    listed: Sequence[Any] = list(values)
    if all(v is None or isinstance(v, (int, float, np.number)) for v in listed):
        return np.array([np.nan if v is None else _float(v) for v in listed])
    result = np.empty(len(listed), dtype=object)
    result[:] = listed
    return result


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number beyond every float
        return np.inf if value > 0 else -np.inf


def _find_roles(data: Mapping[str, Any], roles: Mapping[str, str | None], source: str) -> dict[str, str]:
    if roles.get("images") and roles.get("tokens"):
        raise InputError("images: expected one column of training data, got both images and tokens")
    named = {}
    for role in _ROLES:
        asked = roles.get(role)
        if asked is not None:
            if asked not in data:
                have = ", ".join(data)
                raise InputError(f"{role}: expected a column of {source}, got {asked!r} (columns: {have})")
            named[role] = asked
        elif role in data:
            named[role] = role
    if roles.get("tokens"):
        named.pop("images", None)
    elif "images" in named:
        named.pop("tokens", None)
    return named
