"""The hour a GPU is there: everything that needs one, in calls of under ten minutes, the most valuable first.

    python -P -m ditscale.bench.gpu_day --out FOLDER    on a GPU; the same command goes on where it was
    python -P -m ditscale.bench.gpu_day --dry-run       the same stages at tiny sizes on a CPU, in under a minute

Each stage leaves ``NN-name.json`` in the folder, with its status, and rows go to ``rows-SUITE.jsonl`` case by case. When all is
done, ``<device>.jsonl`` is what belongs into ``bench/results``. No network is used. Exit code: 0 all stages are done, 1 one
of them found something wrong, 3 the time of this call was up and the same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditscale.errors import InputError

DONE, PARTIAL, UNAVAILABLE, FAILED = "done", "partial", "unavailable", "failed"
_AGAIN = 3


@dataclass
class Day:
    """What the stages share.

    Attributes:
        out: the folder.
        device: "cuda", or "cpu" in a dry run.
        dry: tiny sizes.
        deadline: ``time.monotonic()`` at which this call must be ready to end.
    """

    out: Path
    device: str
    dry: bool
    deadline: float

    @property
    def seconds_left(self) -> float:
        """Of this call."""
        return self.deadline - time.monotonic()


class TimeUp(Exception):
    """The stage stopped in an orderly way; the next call goes on with it."""


class Unavailable(Exception):
    """What the stage needs is not on this machine; the message says what."""


Stage = Callable[[Day], dict[str, Any]]


def stages() -> dict[str, tuple[Stage, float]]:
    """The stages in order, each with the seconds that it should have before it is begun."""
    from ditscale.bench import gpu_stages as s

    return {
        "environment": (s.environment, 10),
        "build": (s.build, 240),
        "operators": (s.operators_against_float64, 60),
        "selfcheck": (s.selfcheck, 30),
        "sanitizer": (s.sanitizer, 90),
        "adaln": (s.suite("adaln", share=0.4), 60),
        "attention": (s.suite("attention", share=0.5), 60),
        "block": (s.suite("block", share=0.6), 60),
        "tests": (s.gpu_tests, 60),
        "profile": (s.profile, 60),
        "step": (s.suite("step"), 120),
        "study": (s.study, 120),
        "adaln-grid": (s.suite("adaln", whole_grid=True), 60),
        "attention-grid": (s.suite("attention", whole_grid=True), 60),
        "results": (s.results, 10),
    }


def run_day(day: Day, only: Sequence[str] = ()) -> dict[str, str]:
    """Do what is not done yet; returns the status of every stage.

    Raises:
        InputError: ``only`` names a stage that there is not.
    """
    from ditscale.kernels import selfcheck

    table = stages()
    unknown = [name for name in only if name not in table]
    if unknown:
        raise InputError(f"--only: expected one of {', '.join(table)}, got {unknown[0]!r}")
    try:
        day.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: expected a folder to write to, got {day.out} ({error.strerror})") from error
    statuses: dict[str, str] = {}
    for number, (name, (stage, seconds)) in enumerate(table.items()):
        path = day.out / f"{number:02d}-{name}.json"
        before = _read(path)
        statuses[name] = before.get("status", PARTIAL)
        if only and name not in only:
            continue
        # Results are gathered anew in every call: they are those of the stages before.
        if statuses[name] in (DONE, UNAVAILABLE) and name != "results" and not only:
            continue
        if day.seconds_left < (0 if day.dry else seconds):
            continue
        statuses[name] = _run_stage(day, name, stage, path, before)
        if selfcheck.context_is_lost(day.device):
            rest = list(table)[number + 1 :]
            return statuses | _in_new_process(day, [n for n in rest if not only or n in only], again=bool(only))
    return statuses


def _in_new_process(day: Day, names: Sequence[str], *, again: bool) -> dict[str, str]:
    """The stages behind one after which nothing runs on the device any more in this process."""
    import subprocess

    from ditscale.bench.gpu_processes import own_command

    paths = {name: day.out / f"{number:02d}-{name}.json" for number, name in enumerate(stages())}
    status = lambda name: str(_read(paths[name]).get("status", PARTIAL))  # noqa: E731
    todo = [name for name in names if again or name == "results" or status(name) not in (DONE, UNAVAILABLE)]
    only = [part for name in todo for part in ("--only", name)]
    if todo and day.seconds_left > 10:
        print("the device's context is lost: a new process goes on", file=sys.stderr, flush=True)
        minutes = str(day.seconds_left / 60)
        subprocess.run(own_command("--out", str(day.out), "--minutes", minutes, *only), stdout=subprocess.DEVNULL)
    return {name: status(name) for name in paths}


def _run_stage(day: Day, name: str, stage: Stage, path: Path, before: dict[str, Any]) -> str:
    started = time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    try:
        content = stage(day)
        status, reason = content.pop("status", DONE), content.pop("reason", None)
    except Unavailable as error:
        content, status, reason = {}, UNAVAILABLE, str(error)
    except TimeUp as error:
        content, status, reason = {}, PARTIAL, str(error)
    except Exception as error:  # a stage that breaks must not cost the hour of those after it
        content, status = {"traceback": traceback.format_exc()}, FAILED
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    seconds = round(time.monotonic() - started, 1)
    head = {"stage": name, "status": status, "reason": reason, "seconds": seconds + before.get("seconds", 0.0)}
    path.write_text(json.dumps(head | {"dry_run": day.dry} | content, indent=1) + "\n")
    print(f"{name}: {status}, {seconds} s{'; ' + reason if reason else ''}", file=sys.stderr, flush=True)
    return status


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ditscale.bench.gpu_day", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="the folder that takes everything; a dry run may do without")
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call; default 9")
    parser.add_argument(
        "--only", action="append", default=[], metavar="STAGE", help="do this stage, done or not; may be repeated"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    # What stages start as processes of their own.
    parser.add_argument("--exercise", choices=("cuda", "triton", "cpu", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--check", metavar="'OPERATOR DTYPE'", help=argparse.SUPPRESS)
    parser.add_argument("--conduct", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    from ditscale.bench import gpu_stages

    if given.check:
        return gpu_stages.check(*given.check.split())
    if given.conduct:
        return gpu_stages.conduct_study(given.conduct)
    if given.exercise:
        return gpu_stages.exercise(given.exercise, given.large)
    import torch

    if not given.dry_run and given.out is None:
        parser.error("--out: expected a folder")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("expected a GPU that torch can use, got none; --dry-run runs the stages on a CPU")
    if given.dry_run:
        torch.set_num_threads(1)  # work this small only waits for a second
    with tempfile.TemporaryDirectory() if given.out is None else contextlib.nullcontext(given.out) as out:
        device = "cpu" if given.dry_run else "cuda"
        day = Day(Path(out), device, given.dry_run, time.monotonic() + 60 * given.minutes)
        try:
            statuses = run_day(day, given.only)
        except InputError as error:
            parser.error(str(error))
    print(json.dumps(statuses))
    if FAILED in statuses.values():
        return 1
    return _AGAIN if PARTIAL in statuses.values() and not given.only else 0


if __name__ == "__main__":
    from ditscale.bench import gpu_day  # stages raise this module's exceptions, which those of __main__ are not

    sys.exit(gpu_day.main())
