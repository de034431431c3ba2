"""Jobs on a Slurm cluster, through submitit: one array job of a study's runs. Needs the package ``submitit``."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditscale.errors import InputError
from ditscale.scaling.jobs import Attempts, EngineOptions, Job, News, do_job


class _Resumable:
    """What submitit runs. Where Slurm takes the node away or the time is up, it queues the same job again."""

    def __call__(self, job: Job) -> str | None:
        return do_job(job)

    def checkpoint(self, job: Job) -> Any:
        import submitit

        # The run has its own checkpoints; the job goes on from the last.
        return submitit.helpers.DelayedSubmission(self, job)


class Slurm:
    """An :class:`~ditscale.scaling.jobs.Engine`.

    Args:
        folder: of the study, on a disk that the nodes see; Slurm's logs go to its ``slurm`` folder.
        threads: CPUs of a task, where no option says otherwise.
        options: parameters of submitit's executor, such as ``timeout_min``, ``gpus_per_node``, ``cpus_per_task``,
            ``slurm_partition``, ``slurm_account`` and ``slurm_array_parallelism``.

    Raises:
        InputError: submitit is not installed, there is no Slurm here, or an option is unknown.
    """

    poll_seconds = 2.0

    def __init__(self, folder: Path, threads: int, options: EngineOptions) -> None:
        try:
            import submitit
        except ImportError as error:
            message = "expected the package submitit to be installed (pip install 'ditscale[slurm]'), got none"
            raise InputError(f"engine slurm: {message} ({error})") from error
        if shutil.which("sbatch") is None:
            raise InputError("engine slurm: expected Slurm's commands here, got no sbatch")
        self._folder = folder / "slurm"
        self._executor = submitit.AutoExecutor(folder=self._folder, cluster="slurm")
        try:
            defaults = {"name": f"ditscale-{folder.name}", "timeout_min": 24 * 60, "cpus_per_task": threads}
            self._executor.update_parameters(**defaults | options.values)
        except (NameError, TypeError, ValueError) as error:
            raise InputError(f"{options.source(error)}: expected submitit's parameters, got {error}") from error
        self._jobs: list[tuple[Job, Any]] = []
        self._attempts = Attempts()
        self._missing: set[str] = set()

    def start(self, jobs: Sequence[Job]) -> None:
        self._adopt(jobs)
        if new := [job for job in jobs if job not in [followed for followed, _ in self._jobs]]:
            self._submit(new)

    def _adopt(self, jobs: Sequence[Job]) -> None:
        """Follow what a killed call left in the queue: beside it, jobs would find their runs' folders in use. What is another
        job by now, as by another ``execution``, is cancelled.
        """
        import submitit

        # The study's folder is locked, so nobody else waits for them.
        names = {path.name.removesuffix("_submitted.pkl") for path in self._folder.glob("*_submitted.pkl")}
        unwanted: list[str] = []
        for name in sorted(names & (_queued() or set())):
            submitted = submitit.SlurmJob(self._folder, name)
            job = submitted.submission().args[0]
            if job in jobs and job not in [other for other, _ in self._jobs]:
                self._attempts.begin(job)
                self._jobs.append((job, submitted))
            else:
                unwanted.append(name)
        self._cancel(unwanted)

    def _submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._attempts.begin(job)
        try:
            with self._executor.batch():
                submitted = [self._executor.submit(_Resumable(), job) for job in jobs]
        except (subprocess.CalledProcessError, RuntimeError) as error:
            raise InputError(f"engine slurm: expected sbatch to take the jobs, got {error}") from error
        self._jobs += zip(jobs, submitted, strict=True)

    def poll(self) -> News:
        said: list[str] = []
        left: list[tuple[Job, Any]] = []
        again: list[Job] = []
        queued = _queued()
        for job, submitted in self._jobs:
            if job.done:
                continue
            if submitted.paths.result_pickle.exists():
                if failed := str(submitted.exception() or "") or submitted.result():
                    return News(False, said, f"{job.run_id}: {failed}")
            elif queued is None or submitted.job_id in queued:
                self._missing.discard(submitted.job_id)
                left.append((job, submitted))
            elif submitted.job_id not in self._missing:
                # What it wrote may reach this machine's view of a shared disk a moment after the queue forgets it.
                self._missing.add(submitted.job_id)
                left.append((job, submitted))
            elif not self._attempts.left(job):
                return News(False, said, self._attempts.verdict(job, f"Slurm's job {submitted.job_id}"))
            else:
                said.append(f"{job.run_id}: Slurm's job {submitted.job_id} died; it goes on in another")
                again.append(job)
        self._jobs = left
        if again:
            self._submit(again)
        return News(bool(self._jobs), said)

    def stop(self) -> None:
        # The jobs in work read the stop file; those in the queue need not begin.
        self._cancel(self._ids(), "--state=PENDING")

    def close(self) -> None:
        queued = _queued()
        self._cancel([i for i in self._ids() if queued is None or i in queued], wait=0.0)

    def _ids(self) -> list[str]:
        return [submitted.job_id for _, submitted in self._jobs]

    def _cancel(self, ids: Sequence[str], *options: str, wait: float = 120.0) -> None:
        """Cancel jobs, those that the options choose, and wait until all of them have left the queue."""
        if ids:  # Slurm takes options without a job for all of the user's jobs
            subprocess.run(["scancel", *options, *ids], capture_output=True)
        deadline = time.monotonic() + wait
        while ids and time.monotonic() < deadline and set(ids) & (_queued() or set()):
            time.sleep(self.poll_seconds)


def _queued() -> set[str] | None:
    """This user's jobs that wait or run, as Slurm names them; None where the queue does not answer."""
    command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return set(answer.stdout.split()) if answer.returncode == 0 else None
