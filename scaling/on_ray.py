"""Jobs on a Ray cluster: one task a run. Needs the package ``ray``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ditscale.errors import InputError
from ditscale.scaling.jobs import Attempts, EngineOptions, Job, News, do_job

_STOP_SECONDS = 120.0


class OnRay:
    """An :class:`~ditscale.scaling.jobs.Engine`.

    The nodes must see the study's folder under the same path.

    Args:
        threads: CPU threads of a task, which it also reserves.
        options: ``address`` of the cluster (default "auto", the one this machine belongs to), and options of a task such as
            ``num_gpus``, ``num_cpus`` or ``resources``.

    Raises:
        InputError: ray is not installed, or no cluster is there.
    """

    poll_seconds = 1.0

    def __init__(self, threads: int, options: EngineOptions) -> None:
        try:
            import ray
        except ImportError as error:
            message = "expected the package ray to be installed (pip install 'ditscale[ray]'), got none"
            raise InputError(f"engine ray: {message} ({error})") from error
        self._ray, values = ray, options.values
        address = values.pop("address", "auto")
        self._joined = not ray.is_initialized()
        if self._joined:
            try:
                ray.init(address=address, log_to_driver=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise InputError(f"engine ray: expected a cluster at {address!r}, got {error}") from error
        try:
            # Attempts are counted here, where a job that has its record is not begun again.
            settings = {"num_cpus": threads, "max_retries": 0} | values
            self._task = ray.remote(_task).options(**settings)
        except (TypeError, ValueError) as error:
            self.close()
            raise InputError(f"{options.source(error)}: expected options of a Ray task, got {error}") from error
        self._threads = threads
        self._jobs: dict[Any, Job] = {}
        self._attempts = Attempts()

    def start(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._attempts.begin(job)
            self._jobs[self._task.remote(job, self._threads)] = job

    def poll(self) -> News:
        said: list[str] = []
        ended, _ = self._ray.wait(list(self._jobs), num_returns=len(self._jobs), timeout=0) if self._jobs else ([], [])
        for reference in ended:
            job = self._jobs.pop(reference)
            try:
                failed = self._ray.get(reference)
            except self._ray.exceptions.RayError as error:
                why = type(error).__name__
                if job.done:
                    continue
                if not self._attempts.left(job):
                    return News(False, said, self._attempts.verdict(job, why))
                said.append(f"{job.run_id}: its task died ({why}); it goes on in another")
                self.start([job])
            else:
                if failed is not None:
                    return News(False, said, failed)
        return News(bool(self._jobs), said)

    def stop(self) -> None:
        # The tasks in work have read the stop file; those that wait begin, read it, and end.
        deadline = time.monotonic() + _STOP_SECONDS
        waiting = list(self._jobs)
        while waiting and time.monotonic() < deadline:
            _, waiting = self._ray.wait(waiting, num_returns=len(waiting), timeout=1.0)

    def close(self) -> None:
        for reference in getattr(self, "_jobs", {}):
            self._ray.cancel(reference, force=True)
        if self._joined:
            self._ray.shutdown()


def _task(job: Job, threads: int) -> str | None:
    """What Ray runs on a node."""
    import torch

    torch.set_num_threads(threads)
    return do_job(job)
