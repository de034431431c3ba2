"""``ditscale bench`` as people and programs call it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import case_rows
from typer.testing import CliRunner

from ditscale import cli
from ditscale.bench import cases as cases_module
from ditscale.bench import models, operators
from ditscale.bench.rows import read_rows, write_rows
from ditscale.bench.runner import Session
from ditscale.errors import InputError


@pytest.fixture(autouse=True)
def _light(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditscale.bench import devices

    for module in (models, operators):
        monkeypatch.setattr(module, "fresh_compile", lambda function, **_: function)
    monkeypatch.setattr(devices, "pin", lambda threads: 1)  # the test process keeps its cores
    cli._gather()


def run(*arguments: str) -> str:
    found = CliRunner().invoke(cli.app, ["bench", *arguments], catch_exceptions=True)
    if isinstance(found.exception, InputError):
        raise found.exception
    assert found.exit_code in (0, 1), found.output
    return found.stdout


def test_json_is_one_object_with_rows_and_what_they_share() -> None:
    content = json.loads(run("adaln", "--tiny", "--device", "cpu", "--only", "layernorm_modulate/forward/", "--json"))
    assert {"device", "versions", "commit", "ceilings", "rows"} <= content.keys()
    assert {row["provider"] for row in content["rows"]} >= {"eager", "compile", "copy"}


def test_rows_go_to_a_file_that_compare_and_table_read(tmp_path: Path) -> None:
    out = tmp_path / "device.jsonl"
    run("attention", "--tiny", "--device", "cpu", "--only", "forward/", "--out", str(out))
    assert {row["suite"] for row in read_rows(out)} == {"ceiling", "attention"}
    assert json.loads(run("compare", str(out), str(out), "--json"))["regressions"] == []
    assert "attention" in run("table", str(out))


def test_compare_exits_with_1_on_a_regression(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", case_rows({"eager": 4.0, "ours-cpu": 1.0}))
    b = write_rows(tmp_path / "b.jsonl", case_rows({"eager": 4.0, "ours-cpu": 2.0}))
    found = CliRunner().invoke(cli.app, ["bench", "compare", str(a), str(b)])
    assert found.exit_code == 1
    assert "1 slower" in found.stdout


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="--device: expected cpu or cuda, got 'tpu'"):
        run("adaln", "--device", "tpu")
    with pytest.raises(InputError, match="--only: expected a part of a case's name"):
        run("adaln", "--tiny", "--device", "cpu", "--only", "nothing like it")
    with pytest.raises(InputError, match="--minutes: expected a number of at least 0, got nan"):
        run("all", "--tiny", "--device", "cpu", "--minutes", "nan")
    with pytest.raises(InputError, match="--seconds: expected a positive number, got -1"):
        run("adaln", "--device", "cpu", "--seconds", "-1")
    with pytest.raises(InputError, match="--grid: expected adaln or attention, got step"):
        run("step", "--tiny", "--device", "cpu", "--grid")
    with pytest.raises(
        InputError, match="--against: expected one of apex-like, compile, .*reference for adaln .* 'nosuch'"
    ):
        run("adaln", "--device", "cpu", "--against", "compile", "--against", "nosuch")
    with pytest.raises(InputError, match="--against: expected none for fit on this device, got 'scipy'"):
        run("fit", "--device", "cpu", "--against", "scipy")
    for suite in ("step", "fit"):
        with pytest.raises(InputError, match="--aot: expected a suite of operators with GPU kernels"):
            run(suite, "--aot")
    with pytest.raises(
        InputError, match="--aot: expected only --only and --json beside it, got --device, --out, --tiny"
    ):
        run("adaln", "--aot", "--only", "forward", "--device", "cuda", "--tiny", "--out", "rows.jsonl")


def test_the_ahead_of_time_table_of_a_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    from ditscale.bench import aot_table
    from ditscale.bench.aot import Entry

    asked: list[tuple[list[str], list[str]]] = []
    kernel = {
        "registers": 40,
        "stack": 0,
        "shared": 0,
        "loads": {128: 4},
        "stores": {},
        "local": 0,
        "bulk": 0,
        "mix": {},
    }

    def gather(families: list[str], *, only: list[str], **_: object) -> aot_table.Table:
        asked.append((families, only))
        entry = Entry("adaln", "a case", "a_kernel", "90", "0 triton 3", 128, 7, kernel)
        return aot_table.Table([entry], efficiency={entry.key: {64: 0.8, 72: 0.9}})

    monkeypatch.setattr(aot_table, "gather", gather)
    (row,) = json.loads(run("adaln", "--aot", "--only", "forward", "--json"))["rows"]
    assert (row["kernel"], row["arch"], row["registers"], row["blocks_per_sm"]) == ("a_kernel", "sm_90", 40, 12)
    assert row["flop_efficiency_by_head"] == {"64": 0.8, "72": 0.9}
    assert asked == [(["adaln", "gelu", "cuda"], ["forward"])]
    run("attention", "--aot")
    assert asked[-1] == (["attn", "rotary", "cuda"], ())
    shown = run("adaln", "--aot")
    assert "a_kernel" in shown and "64: 80 % 72: 90 %" in shown


def test_all_suites_in_one_file_that_appears_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A row of each suite is enough here: the suites themselves are tested elsewhere.
    whole = Session.suite
    monkeypatch.setattr(Session, "suite", lambda self, name, **more: itertools.islice(whole(self, name, **more), 1))
    monkeypatch.setattr(Session, "host_rows", lambda self: iter(()))
    out = tmp_path / "rows.jsonl"
    content = json.loads(run("all", "--tiny", "--device", "cpu", "--out", str(out), "--json"))
    assert {row["suite"] for row in read_rows(out)} == {
        "ceiling",
        "fit",
        "flops",
        "step",
        "block",
        "attention",
        "adaln",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]
    assert len(content["rows"]) + len(content["ceilings"]) == len(read_rows(out))


def test_what_does_not_fit_the_time_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "suite", lambda self, name, **_: self.case(cases_module.block_case(2, 16, 32, 2)))
    out = tmp_path / "rows.jsonl"
    text = run("all", "--tiny", "--device", "cpu", "--minutes", "0", "--out", str(out))
    assert {row["status"] for row in read_rows(out) if row["suite"] != "ceiling"} == {"skipped"}
    assert "the time was up" in text


def test_pytest_benchmark_finds_its_entries() -> None:
    pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")
    folder = Path(__file__).resolve().parents[2] / "bench"
    if not (folder.parent / "pyproject.toml").is_file():
        pytest.skip("this is an installed package")
    quick = ["--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0.001", "--benchmark-warmup=off"]
    chosen = ["-k", "gate_residual and forward_backward and float32 and eager and D384 and not layernorm"]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder), *quick, *chosen]
    # Not a worker of this run, for those do not measure.
    apart = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, env=apart)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
