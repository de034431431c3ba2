"""The GPU day without a GPU: every stage at tiny sizes, resumed, and what a stage that breaks costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ditscale.bench import cases, gpu_day, gpu_processes, gpu_stages, runner
from ditscale.bench.gpu_day import DONE, FAILED, PARTIAL, UNAVAILABLE, Day, TimeUp, Unavailable, run_day
from ditscale.bench.rows import read_rows
from ditscale.errors import InputError
from ditscale.kernels import selfcheck


def test_the_dry_run_does_every_stage(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "ditscale.bench.gpu_day", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == set(gpu_day.stages())
    assert set(json.loads(done.stdout).values()) == {DONE}
    (rows,) = [p for p in tmp_path.glob("*.jsonl") if not p.name.startswith("rows-")]
    assert {r["suite"] for r in read_rows(rows)} >= {"ceiling", "host", "adaln", "attention", "block", "step"}
    assert (tmp_path / "figures" / f"speedups-{rows.stem}.svg").is_file()
    # What is written is committed: it tells nothing of where it was made.
    for path in tmp_path.glob("*.json"):
        assert str(Path.home()) not in path.read_text(), path.name
    assert run_day(Day(tmp_path, "cpu", True, 0.0))["study"] == DONE  # nothing is left to do, and nothing is done


def test_what_a_machine_lacks_is_no_failure_of_the_command() -> None:
    program = """
import runpy, sys
from ditscale.bench import gpu_stages
def absent(day):
    raise gpu_stages.Unavailable("no nvcc here")
gpu_stages.build = absent
sys.argv = ["gpu_day", "--dry-run", "--only", "build"]
runpy.run_module("ditscale.bench.gpu_day", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["build"] == UNAVAILABLE


def test_a_dry_run_needs_no_folder(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr(gpu_day, "stages", lambda: {"one": (lambda day: seen.append(day.out) or {}, 0)})
    assert gpu_day.main(["--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out) == {"one": DONE}
    assert not seen[0].exists()


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(tmp_path, "cpu", True, time.monotonic() + 60)


def test_a_stage_that_breaks_costs_no_other(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Day) -> dict[str, object]:
        raise ValueError("no such\nkernel")

    def absent(_: Day) -> dict[str, object]:
        raise Unavailable("no ncu here")

    def late(_: Day) -> dict[str, object]:
        raise TimeUp("3 of 5 cases to go")

    def fine(_: Day) -> dict[str, object]:
        return {"number": 3}

    table = {"broken": (broken, 0), "absent": (absent, 0), "late": (late, 0), "fine": (fine, 0)}
    monkeypatch.setattr(gpu_day, "stages", lambda: table)
    found = run_day(day)
    assert found == {"broken": FAILED, "absent": UNAVAILABLE, "late": PARTIAL, "fine": DONE}
    said = json.loads((day.out / "00-broken.json").read_text())
    assert said["reason"] == "ValueError: no such kernel"
    assert json.loads((day.out / "03-fine.json").read_text())["number"] == 3
    # The next call does what failed or is not ended, and leaves what is done.
    again: list[str] = []
    for name in table:
        monkeypatch.setitem(table, name, (lambda _, name=name: again.append(name) or {}, 0))
    assert set(run_day(day).values()) == {DONE, UNAVAILABLE}
    assert again == ["broken", "late"]


def test_a_stage_is_not_begun_without_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "stages", lambda: {"long": (lambda day: {}, 240)})
    assert run_day(Day(tmp_path, "cuda", False, time.monotonic() + 100)) == {"long": PARTIAL}
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_operator_fails_its_stage_and_is_named(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    from ditscale.bench import operators

    right = operators.kernels.gate_residual
    monkeypatch.setattr(operators.kernels, "gate_residual", lambda *a, **k: right(*a, **k) + 1e-3)
    found = gpu_stages.operators_against_float64(day)
    assert found["status"] == FAILED
    assert "gate_residual" in found["reason"]


def test_a_tool_that_watched_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_stages, "_operators", lambda: ("gate_residual",))
    assert gpu_stages.exercise("reference", large=False) == 0
    monkeypatch.setattr(gpu_stages, "_operators", lambda: ())
    assert gpu_stages.exercise("reference", large=False) == 3
    assert capsys.readouterr().err.splitlines() == ["reference: ran gate_residual", "reference: ran nothing"]


def test_the_study_can_be_laid_out() -> None:
    from ditscale.scaling.study import design

    config = gpu_stages.study_config(dry=False)
    runs = design(config)
    assert len(runs) == 25
    assert min(run.steps for run in runs) >= 100
    assert min(run.flops for run in runs) > 0.9e14
    assert max(run.flops for run in runs) < 1.1e16
    assert config.target == 10**17


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="--only: expected one of environment, build.*got 'nothing'"):
        run_day(Day(tmp_path, "cpu", True, 0.0), ["nothing"])
    with pytest.raises(SystemExit, match="2"):
        gpu_day.main([])
    assert "--out: expected a folder" in capsys.readouterr().err


def test_commands_beside_one_another_lose_nothing_when_the_time_is_up(tmp_path: Path) -> None:
    programs = ("echo right; exit 9", "echo begun; sleep 600; echo late")  # whose child holds the pipes open
    day = Day(tmp_path, "cuda", False, time.monotonic() + 17)  # 15 seconds are kept for what comes behind
    ended, late = gpu_processes.outcomes([["sh", "-c", p] for p in programs], day)
    assert ended == (9, "right\n", "")
    assert late == (None, "begun\n", "")


def test_checks_that_break_or_do_not_end_cost_no_other_its_rows(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    row = json.dumps({"case": "one", "provider": "ours-cuda", "status": "right", "reason": None})
    found: dict[str, tuple[int | None, str, str]] = {}
    monkeypatch.setattr(gpu_stages, "_operators", lambda: ("gate_residual",))
    monkeypatch.setattr(gpu_stages, "outcomes", lambda commands, day, **_: [found[c[-1].split()[1]] for c in commands])
    real = Day(day.out, "cuda", False, day.deadline)
    found |= dict.fromkeys(gpu_stages.DTYPES, (0, row + "\n", ""))
    assert gpu_stages.operators_against_float64(real)["checked"] == 3
    found["float16"] = (None, row + '\n{"case": "cut o', "")
    late = gpu_stages.operators_against_float64(real)
    assert (late["status"], late["reason"], late["checked"]) == (PARTIAL, "no time for gate_residual/float16", 3)
    found["bfloat16"] = (-11, row + "\n", "Segmentation fault")
    broken = gpu_stages.operators_against_float64(real)
    assert broken["status"] == FAILED
    assert broken["bad"] == [
        {"case": "gate_residual/bfloat16", "provider": "all", "status": "failed", "reason": "Segmentation fault"}
    ]


def test_a_new_process_goes_on_where_one_has_lost_the_device(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def process(command: list[str], **_: object) -> None:
        asked.append(command)
        (day.out / "03-behind.json").write_text('{"status": "done"}')

    table = {name: (lambda _: {}, 0) for name in ("fine", "breaks", "done", "behind")}
    monkeypatch.setattr(gpu_day, "stages", lambda: table)
    (day.out / "02-done.json").write_text('{"status": "done"}')
    monkeypatch.setattr(selfcheck, "context_is_lost", lambda device: (day.out / "01-breaks.json").exists())
    monkeypatch.setattr(subprocess, "run", process)
    assert run_day(day) == dict.fromkeys(table, DONE)
    assert [c[c.index("--only") :] for c in asked] == [["--only", "behind"]]


def test_a_suite_leaves_the_others_their_share_of_the_time(day: Day, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Day(day.out, "cpu", False, time.monotonic() + 600)
    one = {"status": "measured", "provider": "ours", "case": "", "commit": "c", "device": {"name": "d"}}

    def case(session: runner.Session, case: cases.Case) -> list[dict[str, object]]:
        real.deadline -= 100  # what a case takes
        return [one | {"case": case.id}]

    monkeypatch.setattr(runner.Session, "start", lambda session: [])
    monkeypatch.setattr(runner.Session, "host_rows", lambda session: [])
    monkeypatch.setattr(runner.Session, "case", case)
    with pytest.raises(TimeUp, match="cases to go"):
        gpu_stages.suite("attention", share=0.4)(real)
    assert 290 < real.seconds_left < 360
