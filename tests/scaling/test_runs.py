"""Run tables: every format in, every mistake named by row and column, nothing pooled by accident."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import os
import sqlite3
import threading
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ditscale.errors import InputError
from ditscale.scaling import RunTable
from ditscale.scaling.readers import MAX_ROWS
from ditscale.scaling.runs import cluster_budgets
from ditscale.scaling.schema import COLUMNS, markdown
from ditscale.scaling.trackers import flatten

ROWS = [
    {"params": 1e6 * (i + 1), "images": 1e5 / (i + 1), "flops": 6e11, "loss": 1.0 / (i + 1), "lr": 1e-3}
    for i in range(4)
]


def _csv(folder: Path, text: str) -> Path:
    path = folder / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return path


def _as_csv(delimiter: str = ",") -> str:
    lines = [delimiter.join(ROWS[0])] + [delimiter.join(str(v) for v in r.values()) for r in ROWS]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolon", "jsonl", "json", "columns", "parquet", "wandb", "study"])
def test_formats(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "runs.txt"
    if kind in ("csv", "tsv", "semicolon"):
        path.write_text(_as_csv({"csv": ",", "tsv": "\t", "semicolon": ";"}[kind]))
    elif kind == "jsonl":
        path = tmp_path / "runs.jsonl"
        path.write_text("\n".join(json.dumps(r) for r in ROWS) + "\n\n")
    elif kind == "json":
        path = tmp_path / "runs.json"
        path.write_text(json.dumps({"runs": ROWS}))
    elif kind == "columns":
        path = tmp_path / "runs.json"
        path.write_text(json.dumps({k: [r[k] for r in ROWS] for k in ROWS[0]}))
    elif kind == "parquet":
        path = tmp_path / "runs.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif kind == "wandb":
        path = tmp_path / "export.json"
        wrapped = [
            {
                "name": f"run-{i}",
                "config": {"params": {"value": r["params"], "desc": None}, "images": {"value": r["images"]}},
                "summary": {"flops": r["flops"], "loss": r["loss"], "lr": r["lr"]},
            }
            for i, r in enumerate(ROWS)
        ]
        path.write_text(json.dumps(wrapped))
    else:
        path = tmp_path / "study"
        extra = [{"role": "prediction", "loss": 0.1}, {"role": "fit", "status": "diverged", "loss": 9.0}]
        for i, record in enumerate([*ROWS, *extra]):
            (path / "runs" / f"r{i}").mkdir(parents=True)
            record = {"role": "fit", "status": "finished", **record}
            (path / "runs" / f"r{i}" / "run.json").write_text(json.dumps(record))
    table = RunTable.read(path)
    assert len(table) == 4
    assert table.data_unit == "images"
    assert table.params.tolist() == [1e6, 2e6, 3e6, 4e6]
    assert table.loss[1] == 0.5


MISTAKES = {
    "empty": ("", "expected a table with a header line, got an empty file"),
    "header only": ("params,images,loss\n", "expected at least one row below the header"),
    "no csv": ("just some words\nand more\n", "expected a CSV table of several columns"),
    "numbers for a header": ("1,2,3\n4,5,6\n", "expected a header line with column names"),
    "duplicate columns": ("params,loss,loss\n1,2,3\n", "every column name once, got 'loss' twice"),
    "ragged": ("params,images,loss\n1,2,3\n4,5\n", "expected 3 cells in line 3"),
    "text in numbers": (
        "params,images,loss\n1,2,3\n4,5,low\n",
        r"loss: expected a number in row 3 .* got " "'low'",
    ),
    "negative": (
        "params,images,loss\n1,2,3\n4,5,-6\n",
        "loss: expected a positive number in row 3 .* got -6",
    ),
    "nan": ("params,images,loss\n1,nan,3\n", "images: expected a positive number in row 2 .* got nan"),
    "empty cell": ("params,images,loss\n1,,3\n2,5,3\n", "images: expected a positive number in row 2"),
    "empty cell among text": ("params,images,loss\n1,2,x\n2,5,\n", "loss: expected a number in row 2"),
    "infinite": ("params,images,loss\n1,2,inf\n", "got inf"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(tmp_path: Path, name: str) -> None:
    text, message = MISTAKES[name]
    with pytest.raises(InputError, match=message) as caught:
        RunTable.read(_csv(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (10**400, "loss: expected a positive number in row 2 of table, got inf"),
        (datetime.datetime(2026, 1, 1), "loss: expected a number in row 2 of table, got datetime"),
        ([1.0, 2.0], r"loss: expected a number in row 2 of table, got \[1.0, 2.0\]"),
        (b"2.0", "loss: expected a number in row 2 of table, got b'2.0'"),
    ],
    ids=["whole number beyond floats", "date", "list", "bytes"],
)
def test_a_cell_that_is_no_number_is_named(loss: object, message: str) -> None:
    rows = [{"params": 1e6, "images": 1e6, "loss": 2.0}, {"params": 2e6, "images": 1e6, "loss": loss}]
    with pytest.raises(InputError, match=message):
        RunTable.from_records(rows)
    assert RunTable.from_records([{**rows[0], "loss": Decimal("2.5")}, rows[0]]).loss.tolist() == [2.5, 2.0]


def test_binary_missing_and_huge_files(tmp_path: Path) -> None:
    binary = tmp_path / "x.csv"
    binary.write_bytes(b"\x00\x01\x02" * 50)
    with pytest.raises(InputError, match="got binary data"):
        RunTable.read(binary)
    latin = tmp_path / "y.csv"
    latin.write_bytes("params,größe\n1,2\n".encode("latin-1"))
    with pytest.raises(InputError, match="no UTF-8"):
        RunTable.read(latin)
    with pytest.raises(InputError, match="expected a file or a study folder, got nothing there"):
        RunTable.read(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"expected a study folder with runs/\*/run.json"):
        RunTable.read(tmp_path)
    many = _csv(tmp_path, "params,images,loss\n" + "1,2,3\n" * (MAX_ROWS + 1))
    with pytest.raises(InputError, match="expected at most 50,000 rows"):
        RunTable.read(many)
    broken = tmp_path / "z.jsonl"
    broken.write_text('{"loss": 1}\n{"loss": \n')
    with pytest.raises(InputError, match="expected a JSON object in line 2"):
        RunTable.read(broken)
    fake = tmp_path / "z.parquet"
    fake.write_text("not parquet")
    with pytest.raises(InputError, match="expected a Parquet file"):
        RunTable.read(fake)


def test_unlike_runs_are_not_pooled() -> None:
    rows = [{**r, "lr_schedule": "linear" if i else "cosine"} for i, r in enumerate(ROWS)]
    with pytest.raises(InputError, match="lr_schedule: expected one value .* got 'cosine' and 'linear'"):
        RunTable.from_records(rows)
    assert len(RunTable.from_records(rows, pool=True)) == 4
    assert len(RunTable.from_records(rows, where="lr_schedule == 'linear'")) == 3


def test_every_seed_may_have_seen_images_of_its_own() -> None:
    rows = [{**r, "seed": i % 2, "data_sha256": "ab"[i % 2] * 64} for i, r in enumerate(ROWS)]
    assert len(RunTable.from_records(rows)) == 4
    rows[3]["data_sha256"] = "c" * 64
    with pytest.raises(InputError, match="data_sha256: expected one value"):
        RunTable.from_records(rows)


def test_roles() -> None:
    both = [{**r, "tokens": r["images"] * 64} for r in ROWS]
    assert RunTable.from_records(both).data_unit == "images"
    named = RunTable.from_records(both, tokens="tokens")
    assert named.data_unit == "tokens" and named.data[0] == 64e5
    with pytest.raises(InputError, match="got both images and tokens"):
        RunTable.from_records(both, tokens="tokens", images="images")
    with pytest.raises(
        InputError, match=r"params: expected a column of table, got 'size' \(columns: " "params, images"
    ):
        RunTable.from_records(ROWS, params="size")
    bare = RunTable.from_records([{"params": 1, "loss": 1}])
    with pytest.raises(InputError, match="expected a column of images or tokens"):
        _ = bare.data
    derived = RunTable.from_records(ROWS, tokens_from_6nd=True)
    assert derived.data_unit == "tokens" and derived.data[0] == 6e11 / 6e6


def test_where() -> None:
    table = RunTable.from_columns({"Model Size": np.arange(1.0, 6.0), "kind": list("aabbb"), "loss": np.ones(5)})
    assert len(table.where("`Model Size` > 2 and kind == 'b'")) == 3
    assert len(table.where("not (kind == 'a') or `Model Size` * 2 <= 2")) == 4
    assert len(table.where("1 < `Model Size` <= 3")) == 2
    for bad in (
        "__import__('os')",
        "loss.real > 0",
        "kind >",
        "size > 3",
        "loss + 1",
        "loss > 'x'",
        "[1] == loss",
        "",
    ):
        with pytest.raises(InputError, match="where: "):
            table.where(bad)
    with pytest.raises(InputError, match="to hold for at least one of 5 rows"):
        table.where("loss > 2")


def test_budgets_from_measured_compute() -> None:
    flops = np.array([1.0e17, 1.1e17, 0.97e17, 3.1e17, 2.9e17, 1e18])
    groups = cluster_budgets(flops)
    assert len(np.unique(groups)) == 3
    assert groups[0] == groups[2] == pytest.approx(np.exp(np.log(flops[:3]).mean()))


def test_drop_highest_is_noted() -> None:
    table = RunTable.from_records(ROWS, drop_highest=1)
    assert table.loss.max() == 0.5
    assert table.notes == ("dropped the 1 highest losses",)
    with pytest.raises(InputError, match="drop-highest: expected 0 to 3"):
        RunTable.from_records(ROWS, drop_highest=4)


def _step_log(folder: Path, kind: str) -> Path:
    """What trackers export: a row a step, a value only at the steps where it was logged."""
    rows = []
    for run in range(3):
        for step in range(0, 400, 100):
            record = {"run_name": f"run-{run}", "step": step, "params": 1e6 * (run + 1), "images": 1e5, "flops": 6e11}
            rows.append({**record, "loss": 2.0 - run / 10 - step / 1e3, "val": None if step == 300 else step + 1.0})
    if kind == "parquet":
        path = folder / "project.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[::-1]), path)
        return path
    lines = [",".join(rows[0])] + [",".join("" if v is None else str(v) for v in r.values()) for r in rows]
    return _csv(folder, "\n".join(lines))


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_trackers_step_log_is_reduced_when_told_to_and_refused_otherwise(tmp_path: Path, kind: str) -> None:
    path = _step_log(tmp_path, kind)
    with pytest.raises(InputError, match="run_name: expected one row a run, got 12 rows of 3 runs"):
        RunTable.read(path)
    table = RunTable.read(path, last_step=True)
    order = np.argsort(table.params)
    assert table.params[order].tolist() == [1e6, 2e6, 3e6]
    assert table.loss[order] == pytest.approx([1.7, 1.6, 1.5])  # of step 300
    assert np.asarray(table.columns["val"])[order].tolist() == [201.0] * 3  # the last one that was logged
    assert table.notes == ("kept the last step of each of 3 runs, of 12 rows",)
    assert len(RunTable.read(path, pool=True)) == 12
    with pytest.raises(InputError, match="last-step: expected a column of runs"):
        RunTable.read(_csv(tmp_path, _as_csv()), last_step=True)


@pytest.mark.parametrize("diverged", [True, False])
def test_a_run_whose_loss_ends_in_nan_is_not_taken_at_the_step_before(tmp_path: Path, diverged: bool) -> None:
    rows = [
        {"run": f"r{k}", "step": step, "params": k * 1e6, "tokens": 1e9, "loss": 3.0 / k - step / 1e4}
        for k in (1, 2, 3)
        for step in (100, 200, 300, 400)
    ]
    for row in rows:
        if row["step"] == 200 or (row["step"] == 400 and row["run"] == "r2"):  # also a step at which none was logged
            row["loss"] = float("nan")
    rows[4 + 1]["loss"] = 1.4 if diverged else float("nan")
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    if diverged:
        with pytest.raises(InputError, match="loss: expected a positive number in row 8 .* got nan"):
            RunTable.read(path, last_step=True)
        assert RunTable.read(path, last_step=True, where="loss > 0").params.tolist() == [1e6, 3e6]
    else:
        assert RunTable.read(path, last_step=True).loss == pytest.approx([2.96, 1.47, 0.96])
    for row in rows:  # a last row that never holds a loss says nothing
        row["loss"] = row["loss"] if row["step"] < 400 else float("nan")
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert RunTable.read(path, last_step=True).loss == pytest.approx([2.97, 1.47, 0.97])


def _trackio(path: Path, *, old: bool = False) -> Path:
    """A project's file as trackio 0.43 makes it (with ``old``, before runs had ids)."""
    run_id = "" if old else "run_id TEXT NOT NULL, "
    key = "run_name" if old else "run_id, run_name"
    database = sqlite3.connect(path)
    database.execute(
        f"CREATE TABLE metrics (id INTEGER PRIMARY KEY AUTOINCREMENT, {run_id}timestamp TEXT NOT NULL, "
        "run_name TEXT NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL)"
    )
    database.execute(
        f"CREATE TABLE configs (id INTEGER PRIMARY KEY AUTOINCREMENT, {run_id}run_name TEXT NOT NULL, "
        "config TEXT NOT NULL, created_at TEXT NOT NULL)"
    )
    for i, row in enumerate(ROWS):
        name = [f"run-{i}"] if old else [f"id{i}", "same name"]
        marks = ", ".join("?" * len(name))
        config = {"model": {"params": row["params"]}, "images": row["images"], "flops": row["flops"], "lr": row["lr"]}
        database.execute(
            f"INSERT INTO configs ({key}, config, created_at) VALUES ({marks}, ?, '')", [*name, json.dumps(config)]
        )
        for step, values in (
            (200, {"loss": row["loss"], "lr": 0.0}),
            (100, {"loss": 9.0, "val": 0.7}),
            (300, {"lr": 0.0}),
        ):
            insert = f"INSERT INTO metrics ({key}, timestamp, step, metrics) VALUES ({marks}, '', ?, ?)"
            database.execute(insert, [*name, step, json.dumps(values)])
    database.commit()
    database.close()
    return path


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("flag", [False, True])
def test_trackios_own_file(tmp_path: Path, old: bool, flag: bool) -> None:
    table = RunTable.read(_trackio(tmp_path / "project.db", old=old), params="model.params", last_step=flag)
    assert table.params.tolist() == [1e6, 2e6, 3e6, 4e6]
    assert table.loss.tolist() == [r["loss"] for r in ROWS]  # of step 200: at 300 none was logged
    assert table.column("val").tolist() == [0.7] * 4 and table.column("step").tolist() == [300] * 4
    assert table.column("lr").tolist() == [1e-3] * 4  # the setting, not the rate at which the run ended
    assert table.columns["metrics.lr"].tolist() == [0.0] * 4


def test_trackios_file_while_it_is_written_to(tmp_path: Path) -> None:
    writer = sqlite3.connect(_trackio(tmp_path / "project.db"))
    writer.execute("PRAGMA journal_mode = WAL")
    with writer:
        writer.execute("UPDATE metrics SET metrics = '{\"loss\": 0.125}' WHERE step = 200")
    assert RunTable.read(tmp_path / "project.db", params="model.params").loss.tolist() == [0.125] * 4
    with writer:
        writer.execute("UPDATE metrics SET metrics = '{\"loss\": \"NaN\"}' WHERE run_id = 'id2'")
    with pytest.raises(InputError, match="loss: expected a positive number in row 3 .*project.db, got nan"):
        RunTable.read(tmp_path / "project.db", params="model.params")
    writer.close()


def test_what_is_no_trackio_file(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE people (name TEXT)")
    with pytest.raises(InputError, match=r"expected a trackio project \(a table metrics\), got tables \['people'\]"):
        RunTable.read(path)
    bad = _trackio(tmp_path / "bad.db")
    with sqlite3.connect(bad) as database:
        database.execute("UPDATE configs SET config = 'lr 3'")
    with pytest.raises(InputError, match="expected JSON objects of logged values, got 'lr 3'"):
        RunTable.read(bad)
    empty = _trackio(tmp_path / "empty.db")
    with sqlite3.connect(empty) as database:
        database.execute("DELETE FROM metrics")
    with pytest.raises(InputError, match="expected at least one run with logged values"):
        RunTable.read(empty)
    cut = tmp_path / "cut.db"
    cut.write_bytes(_trackio(tmp_path / "whole.db").read_bytes()[:5000])
    with pytest.raises(InputError, match="expected a trackio project's SQLite file, got") as caught:
        RunTable.read(cut)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["python", "json", "parquet"])
def test_wandbs_runs_with_whole_configs_in_cells(tmp_path: Path, text: str) -> None:
    # wandb's guide exports runs as a pandas table of config, summary and name, each cell a dictionary's text.
    records = []
    for i, row in enumerate(ROWS):
        config = {"params": {"value": row["params"]}, "data": {"images": row["images"], "flip": True}, "lr": row["lr"]}
        summary = {"flops": row["flops"], "loss": row["loss"], "lr": 0.0, "grad": float("nan"), "best": None}
        records.append({"": i, "summary": summary, "config": config, "name": f"run-{i}"})
    if text == "parquet":
        path = tmp_path / "runs.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        write = str if text == "python" else json.dumps
        path = tmp_path / "runs.csv"
        with path.open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(records[0])
            rows.writerows([write(v) if isinstance(v, dict) else v for v in r.values()] for r in records)
    table = RunTable.read(path, images="data.images")
    assert table.params.tolist() == [1e6, 2e6, 3e6, 4e6] and table.data.tolist() == [r["images"] for r in ROWS]
    assert table.loss.tolist() == [r["loss"] for r in ROWS] and table.column("lr").tolist() == [1e-3] * 4
    assert len(table.where("name != 'run-0' and `data.flip` == 'true'")) == 3


def test_names_of_nested_values_have_five_parts_at_most() -> None:
    record: object = 1.0
    for _ in range(5000):  # deeper than Python can call itself
        record = {"a": record}
    assert list(flatten({"b": record})) == ["b.a.a.a.a"]


def test_a_damaged_config_cell_is_named(tmp_path: Path) -> None:
    path = _csv(tmp_path, 'name,config\na,"{\'lr\': 1}"\nb,"{lr: 2}"\n')
    with pytest.raises(InputError, match=r"config: expected JSON or a Python dictionary in row 3 .*, got '\{lr: 2\}'"):
        RunTable.read(path)
    # Braces in any other column are text.
    other = _csv(tmp_path, "params,loss,note\n1,2,{a}\n2,3,{b}\n")
    assert RunTable.read(other).columns["note"].tolist() == ["{a}", "{b}"]


@pytest.mark.parametrize(("name", "word"), [("runs.csv.gz", "a gzip file"), ("runs.xlsx", "a spreadsheet")])
def test_packed_files_are_told_by_what_they_hold(tmp_path: Path, name: str, word: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(_as_csv().encode()) if "gz" in name else b"PK\x03\x04" + bytes(60))
    with pytest.raises(InputError, match=word):
        RunTable.read(path)
    parquet = tmp_path / "renamed.csv"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), parquet)
    assert len(RunTable.read(parquet)) == 4


def test_a_run_that_was_exported_twice_counts_once(tmp_path: Path) -> None:
    text = _as_csv()
    twice = RunTable.read(_csv(tmp_path, text + "\n".join(text.splitlines()[1:3]) + "\n"))
    assert len(twice) == 4 and "2 rows that copy another" in twice.notes[0]
    other = text.splitlines()[1].rsplit(",", 1)[0] + ",0.002\n"  # the same run but for its learning rate
    assert len(RunTable.read(_csv(tmp_path, text + other))) == 5


def test_every_column_of_a_study_has_a_meaning_and_a_unit() -> None:
    known = {name for column in COLUMNS for name in (column.name, *column.also)}
    assert {"params", "images", "tokens", "unique_images", "flops", "loss", "loss_kind", "loss_window"} <= known
    assert {"seed", "lr", "batch", "lr_schedule", "architecture", "data", "flop_convention"} <= known
    assert all(column.unit and column.meaning for column in COLUMNS)
    assert len(known) == sum(1 + len(column.also) for column in COLUMNS)
    for name in ("loss_kind", "schedule", "architecture", "dataset"):
        with pytest.raises(InputError, match=f"{name}: expected one value over all runs"):
            RunTable.from_records([{**r, name: "ab"[i % 2]} for i, r in enumerate(ROWS)])


def test_the_guide_lists_the_columns() -> None:
    guide = Path(__file__).resolve().parents[2] / "docs" / "fitting.md"
    assert markdown() in guide.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("kind", "rows"), [("csv", 10_000_000), ("parquet", 10_000_000), ("jsonl", 100_000), ("json", 6_000_000)]
)
def test_millions_of_rows_get_one_line_and_no_time(tmp_path: Path, kind: str, rows: int) -> None:
    path = tmp_path / f"runs.{kind}"
    if kind == "parquet":
        zeros = np.zeros(rows, np.int8)
        pyarrow.parquet.write_table(pyarrow.table({"params": zeros, "loss": zeros}), path)
    else:
        row = {"csv": "1,2,3\n", "jsonl": '{"params":1,"loss":2}\n', "json": '{"params":1,"loss":2},\n'}[kind]
        with path.open("w") as stream:
            stream.write({"csv": "params,images,loss\n", "jsonl": "", "json": "["}[kind])
            for _ in range(rows // 100_000):
                stream.write(row * 100_000)
    begun = time.perf_counter()
    with pytest.raises(InputError, match="expected at most") as caught:
        RunTable.read(path)
    path.unlink()
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - begun < 10


def test_a_pipe_is_read_as_a_file_is(tmp_path: Path) -> None:
    text = "params,images,flops,loss\n1e6,2e6,3e13,0.5\n2e6,2e6,6e13,0.4\n"
    (tmp_path / "runs.csv").write_text(text)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
    writer.start()
    piped = RunTable.read(tmp_path / "pipe")
    writer.join()
    assert {k: v.tolist() for k, v in piped.columns.items()} == {
        k: v.tolist() for k, v in RunTable.read(tmp_path / "runs.csv").columns.items()
    }
