"""Run a study's plan on an engine, and follow it by what the runs' folders hold.

Nothing is kept in memory that matters: a run is done when its ``run.json`` exists. So a study that was stopped in any
way, ``kill -9`` included, goes on with the same call: finished runs are kept, the interrupted ones resume.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditscale.errors import InputError
from ditscale.scaling.jobs import ENGINES, Engine, EngineOptions, Job
from ditscale.scaling.study import PlannedRun, Study

# The end of a metrics file that surely holds its last whole line.
_TAIL_BYTES = 4096


class Interrupted(Exception):
    """The study was stopped; the same command goes on."""


@dataclass
class Progress:
    """How far a batch of runs has come, for a progress display.

    Attributes:
        total, done: FLOPs of all runs, and of those finished, by plan.
        active: for each run in work: steps done, steps, smoothed training loss.
        finished: records in the order in which they came.
        planned: FLOPs of each run.
    """

    total: int
    done: int = 0
    active: dict[str, tuple[int, int, float]] = field(default_factory=dict)
    finished: list[dict[str, Any]] = field(default_factory=list)
    planned: dict[str, int] = field(default_factory=dict)

    def flops_of(self, run_id: str) -> float:
        """FLOPs that a run in work has spent so far."""
        steps_done, steps, _ = self.active[run_id]
        return self.planned[run_id] * steps_done / steps


def open_engine(
    name: str, study: Study, *, workers: int, threads: int, options: Mapping[str, Any] | None = None
) -> Engine:
    """An engine by its name.

    Args:
        name: "local", "slurm" or "ray".
        study: whose runs it will do; its ``engine_options`` count where its ``engine`` is this one.
        workers: processes of "local".
        threads: of each process or task.
        options: of "slurm" and "ray"; see there. They go before the study's. Default: none.

    Raises:
        InputError: no such engine, or it cannot be used here.
    """
    theirs = study.config.engine_options if study.config.engine == name else {}
    given = EngineOptions(theirs, options or {})
    if name == "local":
        if given.call:
            raise InputError(f"--option: expected none for the local engine, got {next(iter(given.call))}")
        from ditscale.scaling.local_pool import LocalPool

        return LocalPool(workers, threads)
    if name == "slurm":
        from ditscale.scaling.slurm import Slurm

        return Slurm(study.folder.resolve(), threads, given)
    if name == "ray":
        from ditscale.scaling.on_ray import OnRay

        return OnRay(threads, given)
    raise InputError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")


def execute(
    study: Study,
    runs: Sequence[PlannedRun],
    engine: Engine,
    *,
    show: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train every run that has no record yet, the costliest first, and return all records in the order of ``runs``.

    Args:
        study: whose folder takes the runs.
        runs: what to train.
        engine: where; it is closed at the end.
        show: called again and again with the progress. Default: None.
        say: takes sentences for a person.

    Raises:
        Interrupted: on Ctrl-C, after the runs in work have written their checkpoints.
        InputError: a run cannot be trained as planned.
    """
    done = {record["run_id"]: record for record in study.records()[0]}
    pending = sorted((run for run in runs if run.run_id not in done), key=lambda run: -run.flops)
    progress = Progress(total=sum(run.flops for run in runs), planned={run.run_id: run.flops for run in runs})
    for run in runs:
        if run.run_id in done:
            progress.done += run.flops
            progress.finished.append(done[run.run_id])
    if pending:
        _follow(study, pending, engine, progress, show, say)
    done = {record["run_id"]: record for record in study.records()[0]}
    missing = [run.run_id for run in runs if run.run_id not in done]
    if missing:
        raise InputError(f"{study.folder}: expected a record of run {missing[0]}, got none")
    return [done[run.run_id] for run in runs]


def _follow(
    study: Study,
    pending: Sequence[PlannedRun],
    engine: Engine,
    progress: Progress,
    show: Callable[[Progress], None] | None,
    say: Callable[[str], None],
) -> None:
    stop_file = study.folder.resolve() / ".stop"
    stop_file.unlink(missing_ok=True)
    jobs = [
        Job(
            run.run_id,
            run.training,
            str(study.run_folder(run.run_id).resolve()),
            execution=dict(study.config.execution),
            extra={"role": run.role, "budget": run.budget},
            stop_file=str(stop_file),
        )
        for run in pending
    ]
    steps = {run.run_id: run.steps for run in pending}
    try:
        engine.start(jobs)
        working = True
        while working:
            news = engine.poll()
            for sentence in news.said:
                say(sentence)
            _look(jobs, steps, progress)
            if show is not None:
                show(progress)
            if news.failed is not None:
                raise InputError(news.failed)
            working = news.working
            if working:
                time.sleep(engine.poll_seconds)
    except KeyboardInterrupt:
        try:
            stop_file.touch()
        except OSError as error:  # a full disk, most often; processes of this machine are told without it
            say(f"{stop_file}: cannot be written ({error.strerror or error}); jobs elsewhere are cancelled")
        engine.stop()
        raise Interrupted from None
    finally:
        engine.close()
        with contextlib.suppress(OSError):
            stop_file.unlink(missing_ok=True)


def _look(jobs: Sequence[Job], steps: Mapping[str, int], progress: Progress) -> None:
    """What the folders say: which runs have their record, how far the others are."""
    told = {record["run_id"] for record in progress.finished}
    for job in jobs:
        if job.run_id in told:
            continue
        if (record := job.record) is not None:
            progress.active.pop(job.run_id, None)
            progress.done += progress.planned[job.run_id]
            progress.finished.append(record)
        elif (last := _last_metrics(Path(job.folder) / "metrics.jsonl")) is not None:
            progress.active[job.run_id] = (last["step"], steps[job.run_id], last["train_loss"] or float("nan"))


def _last_metrics(path: Path) -> dict[str, Any] | None:
    """The last whole line of a run's metrics; None where there is none yet."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        row = json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and "step" in row and "train_loss" in row else None
