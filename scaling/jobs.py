"""One run of a study as a job that any machine can do, and what a place to do jobs must offer.

A job is done when its run's ``run.json`` is there, whole. So it may be begun twice, killed, and begun again anywhere that
sees the study's folder: the run goes on from its last checkpoint, and two at once are kept apart by the run's lock.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ditscale.dit.files import read_json
from ditscale.errors import InputError

ENGINES = ("local", "slurm", "ray")
# How often a job is begun again after its process died, before the study stops and says so.
ATTEMPTS = 3
_ASK_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """A run to be done.

    Args:
        run_id: names it; a hash of ``training``.
        training: fields of the trainer's configuration.
        folder: of the run, absolute.
        execution: fields of ``ditscale.dit.training.Execution``. Default: none.
        extra: further fields of its record. Default: none.
        stop_file: a file that asks the job to write a checkpoint and end, while it exists. Default: none.
    """

    run_id: str
    training: dict[str, Any]
    folder: str
    execution: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    stop_file: str | None = None

    @property
    def record(self) -> dict[str, Any] | None:
        """The run's record; None where it has none, or a damaged one, which the run is trained again for."""
        try:
            record = read_record(Path(self.folder) / "run.json")
        except InputError:
            return None
        return record if record["run_id"] == self.run_id else None

    @property
    def done(self) -> bool:
        """Whether the run has its record."""
        return self.record is not None


def read_record(path: Path) -> dict[str, Any]:
    """A finished run's record.

    Raises:
        InputError: there is none, or it is damaged.
    """
    record = read_json(path)
    if not isinstance(record, dict) or not {"run_id", "status", "loss", "flops"} <= record.keys():
        raise InputError(f"{path}: expected a finished run record, got a damaged one")
    return record


@dataclass(frozen=True)
class EngineOptions:
    """Options of an engine, and who gave them.

    Args:
        study: the study's ``engine_options``. Default: none.
        call: those of ``--option``, which go before. Default: none.
    """

    study: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """What holds."""
        return {**self.study, **self.call}

    def source(self, error: object) -> str:
        """Who gave the option that an error speaks of; where it speaks of none, all that gave any."""
        told = str(error)
        for name in sorted(self.values, key=len, reverse=True):
            if name in told:
                return f"--option {name}" if name in self.call else f"engine_options.{name}"
        given = [who for who, options in (("engine_options", self.study), ("--option", self.call)) if options]
        return ", ".join(given) or "--option"


class News(NamedTuple):
    """What has happened to an engine's jobs since it was last asked.

    Attributes:
        working: whether a job is still to end.
        said: sentences for a person.
        failed: why a job cannot be done; None where none has failed.
    """

    working: bool
    said: Sequence[str] = ()
    failed: str | None = None


class Engine(Protocol):
    """A place where jobs are done: processes of this machine, a batch system, a cluster.

    An engine begins a job again whose process died, up to ``ATTEMPTS`` times in all.

    Attributes:
        poll_seconds: how often it likes to be asked.
    """

    poll_seconds: float

    def start(self, jobs: Sequence[Job]) -> None:
        """Begin, in this order."""

    def poll(self) -> News:
        """What is new."""

    def stop(self) -> None:
        """Let the jobs in work write a checkpoint and end; begin no more. Returns when they have, or after a while."""

    def close(self) -> None:
        """Leave nothing behind. Always called last."""


def do_job(
    job: Job, *, should_stop: Callable[[], bool] | None = None, say: Callable[[str], None] | None = None
) -> str | None:
    """Train a job's run, or go on with it. Runs wherever the engine puts it.

    Returns:
        Why it cannot be done, in one line; None where it is done, or was asked to stop.
    """
    from ditscale.dit.training import Execution, Stopped, TrainConfig, train

    asked, stop = 0.0, False

    def stopped() -> bool:
        nonlocal asked, stop
        # A look at a shared disk now and then, not in every step.
        if job.stop_file is not None and time.monotonic() - asked > _ASK_SECONDS:
            asked, stop = time.monotonic(), Path(job.stop_file).exists()
        return stop or (should_stop is not None and should_stop())

    try:
        train(
            TrainConfig.from_dict(job.training),
            job.folder,
            execution=Execution.from_dict(job.execution),
            should_stop=stopped,
            say=say,
            extra=job.extra,
        )
    except Stopped:
        pass
    except InputError as error:
        return str(error)
    except Exception as error:
        # Begun again it would fail again, and no engine brings home more of it than this.
        if not isinstance(error, OSError):
            traceback.print_exc()
        return f"{job.run_id}: {type(error).__name__}: {error}"
    return None


class Attempts:
    """Counts how often each job was begun, and says when it is enough."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}

    def begin(self, job: Job) -> None:
        """Count one."""
        self._begun[job.run_id] = self._begun.get(job.run_id, 0) + 1

    def left(self, job: Job) -> bool:
        """Whether the job may be begun again."""
        return self._begun.get(job.run_id, 0) < ATTEMPTS

    def verdict(self, job: Job, why: str) -> str:
        """The sentence about a job whose process died once too often."""
        return f"{job.run_id}: its process died {self._begun[job.run_id]} times ({why}); see {job.folder}"
