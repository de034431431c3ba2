"""Engines that do a study's jobs: local processes by default; a real Slurm and a real Ray cluster, started by the test, when
asked for with ``-m slow``. On each a worker is killed in the middle of a run, and the results are those of undisturbed runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import getpass
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ditscale.dit.data import emoji_vocabulary
from ditscale.errors import InputError
from ditscale.scaling import study_commands
from ditscale.scaling.execute import Interrupted, execute, open_engine
from ditscale.scaling.jobs import ATTEMPTS, EngineOptions, Job, News, do_job
from ditscale.scaling.local_pool import LocalPool
from ditscale.scaling.slurm import Slurm
from ditscale.scaling.study import Study, StudyConfig, plan_run


def small(**changes):
    settings = {
        "name": "small", "budgets": (3 * 10**8, 6 * 10**8, 12 * 10**8), "target": 2 * 10**10, "sizes": 4,
        "prior_coefficient": 1.0, "prior_exponent": 0.45, "head_width": 8, "depth": 1, "widths": (8, 16, 24, 32),
        "model": {
            "image_size": 16, "latent_factor": 1, "in_channels": 3, "patch": 4, "condition": "caption",
            "vocabulary_size": len(emoji_vocabulary()), "learn_sigma": False, "frequency_width": 16,
        },
        "training": {"batch": 4, "evaluation_images": 4, "evaluation_times": 2},
        "execution": {"checkpoint_seconds": 0.05},
    }  # fmt: skip
    return StudyConfig(**{**settings, **changes})


def study_of(folder, flops):
    study = Study.create(folder, small())
    return study, [plan_run(study.config, study.config.size(width), flops, "fit") for width in (8, 16, 24)]


@pytest.fixture
def study(tmp_path):
    """A study and three runs of it that take a second or so."""
    return study_of(tmp_path / "study", 4 * 10**8)


@pytest.fixture
def longer_study(tmp_path):
    """The same with runs of several seconds: a scheduler takes seconds to say what it does."""
    return study_of(tmp_path / "study", 8 * 10**9)


def result(record):
    return {k: v for k, v in record.items() if "second" not in k and not k.endswith("_at") and k != "threads"}


def undisturbed(tmp_path, runs):
    """The records of the same runs, each in peace."""
    records = []
    for run in runs:
        folder = tmp_path / "peace" / run.run_id
        assert do_job(Job(run.run_id, run.training, str(folder), extra={"role": "fit", "budget": run.budget})) is None
        records.append(json.loads((folder / "run.json").read_text()))
    return records


class Killer:
    """A progress display that kills, once, whoever trains a run that has left a checkpoint."""

    def __init__(self, study):
        self.study, self.killed = study, []

    def __call__(self, progress):
        for run_id in [] if self.killed else progress.active:
            folder = self.study.run_folder(run_id)
            if list(folder.glob("checkpoint-*.json")):
                for pid in holders(folder / ".lock"):
                    with contextlib.suppress(ProcessLookupError):  # it ended by itself, or with another of them
                        os.kill(pid, signal.SIGKILL)
                        self.killed.append(pid)


def holders(path):
    """The processes that have a file open."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            try:
                if any(os.readlink(link) == str(path.resolve()) for link in (process / "fd").iterdir()):
                    found.append(int(process.name))
            except OSError:
                continue
    return found


def check_killed(study, runs, engine, tmp_path):
    killer, said = Killer(study), []
    records = execute(study, runs, engine, show=killer, say=said.append)
    assert killer.killed, "no run was caught in the middle"
    assert any("it goes on in another" in sentence for sentence in said), said
    assert [result(r) for r in records] == [result(r) for r in undisturbed(tmp_path, runs)]
    assert execute(study, runs, engine_that_must_not_start(), say=said.append) == records


def engine_that_must_not_start():
    class Idle:
        poll_seconds = 0.0

        def start(self, jobs):
            pytest.fail("finished runs were begun again")

    return Idle()


def test_a_worker_that_is_killed_is_replaced(study, tmp_path):
    study, runs = study
    check_killed(study, runs, LocalPool(2, 1), tmp_path)


def test_runs_may_have_data_workers(tmp_path):
    study = Study.create(tmp_path / "study", small(execution={"data_workers": 1}))
    run = plan_run(study.config, study.config.size(8), 10**8, "fit")
    assert execute(study, [run], LocalPool(1, 1))[0]["status"] == "finished"


def test_asking_whether_to_stop_takes_no_lock():
    """A process that is killed while it looks at an Event keeps the Event's lock, and the pool would hang."""
    assert isinstance(LocalPool(1, 1)._stop, ctypes.c_byte)


def test_ctrl_c_leaves_checkpoints_and_the_same_call_goes_on(study):
    study, runs = study

    def interrupt(progress):
        if any(list(study.run_folder(run_id).glob("checkpoint-*.json")) for run_id in progress.active):
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(study, runs, LocalPool(1, 1), show=interrupt)
    assert list(study.folder.glob("runs/*/checkpoint-*.json")) and not (study.folder / ".stop").exists()
    assert len(execute(study, runs, LocalPool(1, 1))) == 3


def test_ctrl_c_on_a_full_disk_stops_in_order_too(study, monkeypatch):
    study, runs = study
    called, said = [], []

    class Engine:
        poll_seconds = 0.0

        def start(self, jobs):
            pass

        def poll(self):
            raise KeyboardInterrupt

        def stop(self):
            called.append("stop")

        def close(self):
            called.append("close")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(Interrupted):
        execute(study, runs, Engine(), say=said.append)
    assert called == ["stop", "close"] and "No space left" in said[0]


def test_a_job_whose_process_always_dies_is_given_up(study, monkeypatch):
    study, runs = study
    monkeypatch.setattr("ditscale.scaling.local_pool._work", os._exit)  # its first argument is no exit code

    with pytest.raises(InputError, match=f"its process died {ATTEMPTS} times \\(exit code"):
        execute(study, runs[:1], LocalPool(1, 1), say=lambda sentence: None)


def test_a_job_that_cannot_be_done_stops_the_study_in_one_line(study):
    study, runs = study
    folder = study.run_folder(runs[0].run_id)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("not a run")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        execute(study, runs[:1], LocalPool(1, 1))


def test_a_fault_that_nobody_foresaw_stops_the_study_with_its_text(study):
    study, runs = study
    folder = study.run_folder(runs[0].run_id)
    (folder / "run.json").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(runs[0].training))
    said = []
    with pytest.raises(InputError, match=rf"{runs[0].run_id}: IsADirectoryError: .*run\.json"):
        execute(study, runs[:1], LocalPool(1, 1), say=said.append)
    assert not any("died" in sentence for sentence in said)


@pytest.mark.parametrize(
    "damage", ['{"run_id": ', "{}", '{"run_id": "x", "status": "finished", "loss": 1, "flops": 1}']
)
def test_a_run_whose_record_is_damaged_is_trained_again(study, damage):
    """While it waits for its turn, its folder holds a record that is none."""
    study, _ = study
    run = plan_run(study.config, study.config.size(8), 2 * 10**7, "fit")
    folder = study.run_folder(run.run_id)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(damage)
    (folder / "config.json").write_text(json.dumps(run.training))
    rounds, finished = [], []

    class Late:
        poll_seconds = 0.0

        def start(self, jobs):
            (self.job,) = jobs

        def poll(self):
            rounds.append(self.job.done)
            if len(rounds) == 3:
                assert do_job(self.job, say=lambda sentence: None) is None
            return News(not self.job.done)

        def close(self):
            pass

    (record,) = execute(study, [run], Late(), show=lambda progress: finished.append(len(progress.finished)))
    assert rounds == [False] * 3 and finished == [0, 0, 1] and record["run_id"] == run.run_id


def test_a_job_heeds_the_stop_file(study, tmp_path):
    study, runs = study
    stop = tmp_path / "stop"
    stop.touch()
    job = Job(runs[0].run_id, runs[0].training, str(tmp_path / "run"), stop_file=str(stop))
    assert do_job(job) is None and not job.done and list((tmp_path / "run").glob("checkpoint-*.json"))
    stop.unlink()
    assert do_job(job) is None and job.done


def test_engines_that_are_not_there_are_named(study, monkeypatch):
    study, _ = study
    with pytest.raises(InputError, match="engine: expected one of local, slurm, ray, got 'k8s'"):
        open_engine("k8s", study, workers=1, threads=1)
    with pytest.raises(InputError, match="--option: expected none for the local engine, got gpus"):
        open_engine("local", study, workers=1, threads=1, options={"gpus": 1})
    for name, package in (("slurm", "submitit"), ("ray", "ray")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(InputError, match=f"engine {name}: expected the package {package}"):
            open_engine(name, study, workers=1, threads=1)


def test_options_of_the_study_and_of_the_call_are_merged_and_told_apart(tmp_path, monkeypatch):
    """An option of the call goes before the study's, the study's count on its own engine only, and a bad one is laid at the
    door of who gave it."""
    taken = []

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, **parameters):
            taken.append(parameters)
            for name, value in parameters.items():
                if value == "bad":
                    raise NameError(f"Unknown argument: {name}")

    monkeypatch.setitem(__import__("sys").modules, "submitit", SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")

    def opened(engine="slurm", call=None, **theirs):
        study = Study.create(tmp_path / "study", small(engine=engine, engine_options=theirs))
        open_engine("slurm", study, workers=1, threads=3, options=call)
        return taken[-1]

    found = opened(slurm_partition="gpu", timeout_min=5, call={"timeout_min": 7, "cpus_per_task": 2})
    assert found == {"name": "ditscale-study", "slurm_partition": "gpu", "timeout_min": 7, "cpus_per_task": 2}
    assert opened() == {"name": "ditscale-study", "timeout_min": 24 * 60, "cpus_per_task": 3}
    assert "num_gpus" not in opened(engine="ray", num_gpus=1), "what the study says of Ray is no word to Slurm"
    for theirs, call, source in (
        ({"partition": "bad"}, {}, "engine_options.partition"),
        ({"timeout_min": 5}, {"partition": "bad"}, "--option partition"),
        ({"partition": "gpu"}, {"partition": "bad"}, "--option partition"),
    ):
        with pytest.raises(InputError, match=f"^{source}: expected submitit's parameters, got .*partition"):
            opened(call=call, **theirs)
    local = Study.create(tmp_path / "study", small(engine="slurm", engine_options={"slurm_partition": "gpu"}))
    assert isinstance(open_engine("local", local, workers=1, threads=1), LocalPool)


def test_the_command_line_s_options_reach_the_engine(tmp_path, monkeypatch):
    seen = []

    def conduct(study, *, engine, options, **_):
        seen.append((engine, options))
        raise Interrupted

    monkeypatch.setattr("ditscale.scaling.conduct.conduct", conduct)
    Study.create(tmp_path / "study", small())
    given = ["gpus_per_node=2", "slurm_partition=gpu", 'slurm_additional_parameters={"qos": "high"}', "comment=a=b"]
    with pytest.raises(SystemExit, match="130"):
        study_commands.run(tmp_path / "study", engine="slurm", option=given)
    extra = {"slurm_additional_parameters": {"qos": "high"}, "comment": "a=b"}
    assert seen == [("slurm", {"gpus_per_node": 2, "slurm_partition": "gpu"} | extra)]
    with pytest.raises(InputError, match="--out: expected none with a study's folder"):
        study_commands.run(tmp_path / "study", out=tmp_path / "elsewhere")
    with pytest.raises(InputError, match="--option: expected NAME=VALUE, got 'gpus'"):
        study_commands.run(tmp_path / "study", engine="slurm", option=["gpus"])


def test_jobs_that_a_killed_call_left_in_slurm_s_queue_go_on(tmp_path, monkeypatch):
    """Another job of the same run would find its folder in use. One that is another by now, or wanted no more, is cancelled."""
    wanted = [Job(name, {}, str(tmp_path / name), execution={"checkpoint_seconds": 5.0}) for name in "abc"]
    left = {
        "1_0": wanted[0],
        "1_1": dataclasses.replace(wanted[1], execution={}),
        "1_2": Job("d", {}, str(tmp_path / "d")),
    }
    queue, submitted, cancelled = {*left, "7"}, [], []

    class Executor:
        def __init__(self, **_):
            pass

        def update_parameters(self, **_):
            pass

        def batch(self):
            return contextlib.nullcontext()

        def submit(self, _, job):
            submitted.append(job)
            return found(tmp_path, f"2_{len(submitted)}")

    def found(folder, identity):
        paths = SimpleNamespace(result_pickle=tmp_path / "none")
        return SimpleNamespace(job_id=identity, paths=paths, submission=lambda: SimpleNamespace(args=(left[identity],)))

    def run(command, **_):
        if command[0] == "scancel":
            cancelled.extend(command[1:])
            queue.difference_update(command[1:])

    (tmp_path / "slurm").mkdir()
    for identity in (*left, "0_9"):  # one ended long ago
        (tmp_path / "slurm" / f"{identity}_submitted.pkl").touch()
    monkeypatch.setitem(__import__("sys").modules, "submitit", SimpleNamespace(AutoExecutor=Executor, SlurmJob=found))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("ditscale.scaling.slurm._queued", lambda: queue)
    monkeypatch.setattr("subprocess.run", run)
    engine = Slurm(tmp_path, 1, EngineOptions())
    engine.start(wanted)
    assert submitted == wanted[1:] and sorted(cancelled) == ["1_1", "1_2"] and "7" in queue
    assert engine._ids() == ["1_0", "2_1", "2_2"] and engine.poll().working
    monkeypatch.setattr(
        "subprocess.run", lambda command, **_: pytest.fail(f"{command} is about all of the user's jobs")
    )
    idle = Slurm(tmp_path, 1, EngineOptions())
    idle.stop()


CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=test Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of one node, started here and stopped afterwards."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs Debian's slurmctld, slurmd, munge and root; lacks {missing or 'root'}")
    folder = tmp_path / "slurm-service"
    for name in (".", "state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    settings = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(ports=ports, cpus=os.cpu_count(), **settings))
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    files = [f"--{name}={folder}/munge.{end}" for name, end in (
        ("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"),
    )]  # fmt: skip
    commands = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D", "-c"], ["slurmd", "-D"]]
    services = []
    try:
        for command in commands:
            log = open(folder / f"{command[0]}.out", "wb")  # noqa: SIM115 - the service keeps it
            services.append(subprocess.Popen(command, stdout=log, stderr=log))
            log.close()
            time.sleep(1.0)
        deadline = time.monotonic() + 60
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%t"], capture_output=True, text=True).stdout:
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.5)
        yield folder
    finally:
        for service in reversed(services):
            service.terminate()
            service.wait(timeout=30)


@pytest.mark.slow
def test_slurm_goes_on_with_a_run_whose_worker_was_killed(slurm, longer_study, tmp_path):
    study, runs = longer_study
    options = {"timeout_min": 10, "slurm_partition": "test"}
    check_killed(study, runs, open_engine("slurm", study, workers=1, threads=1, options=options), tmp_path)


@pytest.mark.slow
def test_slurm_stops_in_order(slurm, longer_study):
    study, runs = longer_study

    def interrupt(progress):
        if progress.active:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        execute(study, runs, open_engine("slurm", study, workers=1, threads=1), show=interrupt)
    assert not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip()
    assert list(study.folder.glob("runs/*/checkpoint-*.json"))
    assert len(execute(study, runs, open_engine("slurm", study, workers=1, threads=1))) == 3


@pytest.fixture
def ray_cluster():
    """A Ray cluster of two nodes on this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_ray_goes_on_with_a_run_whose_worker_was_killed(ray_cluster, longer_study, tmp_path):
    import ray

    study, runs = longer_study
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    check_killed(study, runs, open_engine("ray", study, workers=1, threads=1), tmp_path)
