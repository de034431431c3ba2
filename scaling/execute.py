"""Run a study's plan on local processes: each takes the next run, writes it to its folder, and asks for another.

Nothing is kept in memory that matters: a run is done when its ``run.json`` exists. So a study that was stopped in any
way, ``kill -9`` included, goes on with the same call: finished runs are kept, the interrupted ones resume.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditscale.errors import InputError
from ditscale.scaling.study import PlannedRun, Study

_POLL_SECONDS = 0.2


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


def execute(
    study: Study,
    runs: Sequence[PlannedRun],
    *,
    workers: int,
    threads: int,
    show: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Train every run that has no record yet, the costliest first, and return all records in the order of ``runs``.

    Args:
        study: whose folder takes the runs.
        runs: what to train.
        workers: processes.
        threads: of each process.
        show: called several times a second with the progress. Default: None.
        say: takes sentences for a person.

    Raises:
        Interrupted: on Ctrl-C, after the workers have written their checkpoints.
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
        _Pool(study, pending, min(workers, len(pending)), threads, progress, show, say).run()
    done = {record["run_id"]: record for record in study.records()[0]}
    missing = [run.run_id for run in runs if run.run_id not in done]
    if missing:
        raise InputError(f"{study.folder}: expected a record of run {missing[0]}, got none")
    return [done[run.run_id] for run in runs]


class _Pool:
    """The parent's side: a queue of runs, the workers' messages, and an orderly end whatever happens."""

    def __init__(
        self,
        study: Study,
        pending: list[PlannedRun],
        workers: int,
        threads: int,
        progress: Progress,
        show: Callable[[Progress], None] | None,
        say: Callable[[str], None],
    ) -> None:
        self.progress, self.show, self.say = progress, show, say
        # A fresh interpreter for each worker: a forked one would inherit torch's thread pool half alive.
        context = multiprocessing.get_context("spawn")
        self.jobs = context.Queue()
        self.messages = context.Queue()
        self.stop = context.Event()
        for run in pending:
            self.jobs.put((run.training, str(study.run_folder(run.run_id)), {"role": run.role, "budget": run.budget}))
        for _ in range(workers):
            self.jobs.put(None)
        arguments = (self.jobs, self.messages, self.stop, threads, os.getpid())
        with _thread_environment(threads):
            self.workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
            for worker in self.workers:
                worker.start()

    def run(self) -> None:
        try:
            while any(worker.is_alive() for worker in self.workers):
                self._listen()
            self._listen()
        except KeyboardInterrupt:
            self.stop.set()
            for worker in self.workers:
                worker.join(timeout=30)
            raise Interrupted from None
        finally:
            self.stop.set()
            for worker in self.workers:
                worker.join(timeout=5)
                if worker.is_alive():
                    worker.terminate()
        failed = [worker.exitcode for worker in self.workers if worker.exitcode]
        if failed:
            raise InputError(
                f"study: expected every worker to end well, got exit code {failed[0]}; see the messages above"
            )

    def _listen(self) -> None:
        deadline = time.monotonic() + _POLL_SECONDS
        while True:
            try:
                kind, run_id, content = self.messages.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                break
            if kind == "step":
                self.progress.active[run_id] = content
            elif kind == "done":
                self.progress.active.pop(run_id, None)
                self.progress.done += self.progress.planned[content["run_id"]]
                self.progress.finished.append(content)
            elif kind == "say":
                self.say(content)
            else:
                raise InputError(content)
            if time.monotonic() > deadline:
                break
        if self.show is not None:
            self.show(self.progress)


def _work(jobs: Any, messages: Any, stop: Any, threads: int, parent: int) -> None:
    """A worker: train what the queue holds until it is empty, the parent says stop, or the parent is gone."""
    # Ctrl-C reaches the whole group; the parent decides, and says so through the event.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    from ditscale.dit.training import Stopped, TrainConfig, train

    torch.set_num_threads(threads)

    def should_stop() -> bool:
        return stop.is_set() or os.getppid() != parent

    while not should_stop():
        try:
            job = jobs.get(timeout=_POLL_SECONDS)
        except queue.Empty:
            continue
        if job is None:
            return
        training, folder, extra = job
        name = Path(folder).name
        last = 0.0

        def step(done: int, steps: int, loss: float, name: str = name) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last > _POLL_SECONDS:
                last = now
                messages.put(("step", name, (done, steps, loss)))

        def say(sentence: str, name: str = name) -> None:
            messages.put(("say", name, sentence))

        try:
            record = train(
                TrainConfig.from_dict(training),
                folder,
                progress=step,
                should_stop=should_stop,
                say=say,
                extra=extra,
            )
        except Stopped:
            return
        except InputError as error:
            messages.put(("error", name, str(error)))
            return
        messages.put(("done", name, record))


@contextlib.contextmanager
def _thread_environment(threads: int) -> Any:
    """Children read their number of threads when they load their libraries, before any line of ours runs there."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(threads) for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
