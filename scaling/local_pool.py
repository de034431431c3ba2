"""The default engine: processes of this machine, each of which trains one run after the other."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ditscale.scaling.jobs import Attempts, Job, News, do_job


class LocalPool:
    """An :class:`~ditscale.scaling.jobs.Engine`.

    Args:
        workers: processes. Where the machine has several GPUs, they are dealt out to the processes in turn.
        threads: of each process.
    """

    poll_seconds = 0.2

    def __init__(self, workers: int, threads: int) -> None:
        self._count, self._threads = workers, threads
        # A fresh interpreter for each worker: a forked one would inherit torch's thread pool half alive.
        self._context = multiprocessing.get_context("spawn")
        self._waiting: collections.deque[Job] = collections.deque()
        self._workers: list[_Worker] = []
        self._attempts = Attempts()
        # No Event: a process that is killed while it looks at one keeps its lock, and all others wait for ever.
        self._stop = self._context.RawValue("b", 0)

    def start(self, jobs: Sequence[Job]) -> None:
        self._waiting.extend(jobs)
        for place in range(min(self._count, len(jobs))):
            self._workers.append(self._hire(place))

    def _hire(self, place: int) -> _Worker:
        mine, theirs = self._context.Pipe()
        with _environment(self._threads, place):
            # No daemon: that may have no children, such as data workers.
            process = self._context.Process(target=_work, args=(theirs, self._stop, self._threads, os.getpid()))
            process.start()
        theirs.close()
        worker = _Worker(process, mine)
        self._give(worker)
        return worker

    def _give(self, worker: _Worker) -> None:
        """The next job, or the word that there is none."""
        worker.job = self._waiting.popleft() if self._waiting and not self._stop.value else None
        if worker.job is not None:
            self._attempts.begin(worker.job)
        with contextlib.suppress(OSError):
            worker.pipe.send(worker.job)

    def poll(self) -> News:
        said: list[str] = []
        for place, worker in enumerate(self._workers):
            try:
                while worker.pipe.poll():
                    kind, text = worker.pipe.recv()
                    if kind == "failed":
                        return News(False, said, text)
                    if kind == "say":
                        said.append(text)
                    else:
                        self._give(worker)
            except (EOFError, OSError):
                job, worker.job = worker.job, None
                if self._stop.value:
                    continue
                if job is not None and not job.done:
                    worker.process.join()
                    why = f"exit code {worker.process.exitcode}"
                    if not self._attempts.left(job):
                        return News(False, said, self._attempts.verdict(job, why))
                    said.append(f"{job.run_id}: its process died ({why}); it goes on in another")
                    self._waiting.appendleft(job)
                if self._waiting:
                    worker.pipe.close()
                    self._workers[place] = self._hire(place)
        return News(any(worker.job is not None for worker in self._workers), said)

    def stop(self) -> None:
        self._stop.value = 1
        for worker in self._workers:
            worker.process.join(timeout=30)

    def close(self) -> None:
        self._stop.value = 1
        for worker in self._workers:
            worker.process.join(timeout=5)
            worker.process.terminate()
            worker.process.join()
            worker.pipe.close()


@dataclass
class _Worker:
    """A process, the pipe to it, and what it does."""

    process: Any
    pipe: Connection
    job: Job | None = None


def _work(pipe: Connection, stop: Any, threads: int, parent: int) -> None:
    """A worker's life: train what comes through the pipe, until nothing comes, the parent says stop, or it is gone."""
    # Ctrl-C reaches the whole group; the parent decides, and says so through the flag.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import torch

    torch.set_num_threads(threads)

    def should_stop() -> bool:
        return bool(stop.value) or os.getppid() != parent

    def say(sentence: str) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone, which should_stop tells
            pipe.send(("say", sentence))

    with contextlib.suppress(EOFError, OSError):  # of the pipe: do_job raises none
        while (job := pipe.recv()) is not None:
            failed = do_job(job, should_stop=should_stop, say=say)
            if failed is not None:
                pipe.send(("failed", failed))
            if should_stop():
                return
            pipe.send(("done", ""))


@contextlib.contextmanager
def _environment(threads: int, place: int) -> Iterator[None]:
    """Children read their number of threads when they load their libraries, before any line of ours runs there."""
    values = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    before = {name: os.environ.get(name) for name in (*values, "DITSCALE_PLACE")}
    os.environ.update(values | {"DITSCALE_PLACE": str(place)})
    try:
        yield
    finally:
        for name in before:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})
