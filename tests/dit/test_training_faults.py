"""Whatever happens to a run, it goes on from its last checkpoint or says why not: kills, full and read-only disks, signals."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from training_cases import metrics, result, stop_after, tiny, weights_of

from ditscale.dit import checkpoint
from ditscale.dit.checkpoint import MetricsLog, newest_checkpoint, read_metrics
from ditscale.dit.files import folder_lock, read_json
from ditscale.dit.training import Execution, Stopped, shards, train
from ditscale.dit.training.batches import Feeder, open_stream
from ditscale.dit.training.ranks import Ranks
from ditscale.dit.training.shards import save_shards
from ditscale.dit.training.step import Stepper
from ditscale.errors import InputError

PROGRAM = Path(__file__).resolve().parents[1] / "killed_program.py"

pytestmark = pytest.mark.usefixtures("one_thread")


def kill(tmp_path, rounds, seed):
    """Rounds of kill -9, what was said of each, and every run that finished in spite of them against one left in peace."""
    config = tiny(images=240)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-P", str(PROGRAM), str(tmp_path / "config.json"), str(tmp_path), str(rounds), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == rounds
    for line in lines:
        # It began where the newest checkpoint was, and left no older one behind.
        assert line["begun"] in (None, line["before"]), line
        assert line["finished"] or line["after"] >= line["before"], line
    whole = tmp_path / "whole"
    finished = sorted(tmp_path.glob("finished-*"))
    if not (tmp_path / "run" / "run.json").exists():
        train(config, tmp_path / "run", execution=Execution(validate_every=7))
    for run in (*finished, tmp_path / "run"):
        assert result(read_json(run / "run.json")) == result(read_json(whole / "run.json"))
        assert weights_of(run) == weights_of(whole) and metrics(run) == metrics(whole)
    return lines


def test_rounds_of_kill_9_lose_nothing_that_was_saved(tmp_path):
    lines = kill(tmp_path, rounds=15, seed=1)
    assert sum(line["killed"] for line in lines) >= 9


@pytest.mark.slow
def test_two_hundred_rounds_of_kill_9(tmp_path):
    lines = kill(tmp_path, rounds=200, seed=2)
    kinds = Counter(line["kind"] for line in lines if line["killed"])
    assert len(kinds) == 5 and min(kinds.values()) >= 10, kinds


def test_a_disk_that_fills_up_is_said_and_survived(tmp_path):
    """No file may grow past 20 kB for a while: no checkpoint fits, metrics do."""
    config = tiny()
    whole = train(config, tmp_path / "whole")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said, seen = [], []

    def should_stop():
        seen.append(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if 4 <= len(seen) < 8 else soft, hard))
        return False

    record = train(
        config, tmp_path / "run", execution=Execution(checkpoint_seconds=0), should_stop=should_stop, say=said.append
    )
    assert result(record) == result(whole) and weights_of(tmp_path / "run") == weights_of(tmp_path / "whole")
    assert len(said) == 1 and "no checkpoint at step 4" in said[0] and "training goes on" in said[0]


def test_a_save_that_fails_leaves_the_one_before_and_says_so(tmp_path, monkeypatch):
    """Also where the one before is of the same step, as when a run goes on into a loss that is NaN."""
    write = checkpoint.write_atomically
    run, said = tmp_path / "run", []
    with pytest.raises(Stopped, match=r"step 3 of 12$") as stopped:
        train(tiny(), run, should_stop=stop_after(3))
    assert stopped.value.saved

    def full(path, data):
        if path.name == "tensors.safetensors":
            raise InputError(f"{path}: no space")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(Stopped, match="step 5 of 12, of which no checkpoint could be written") as stopped:
        train(tiny(), run, should_stop=stop_after(2), say=said.append)
    assert not stopped.value.saved and len(said) == 1 and newest_checkpoint(run)[0].step == 3
    monkeypatch.setattr(Stepper, "gradients", lambda self, inputs: (float("nan"), torch.tensor(1.0)))
    assert train(tiny(), run, say=said.append)["status"] == "diverged"
    assert newest_checkpoint(run)[0].step == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_the_full_disk_stops_no_training(tmp_path, monkeypatch):
    """What cannot be saved is said to stderr, and that is often a file on the same disk."""

    write = checkpoint.write_atomically

    def full(path, data):
        if path.name == "tensors.safetensors":
            raise InputError(f"{path}: no space")
        write(path, data)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    log = open("/dev/full", "w", buffering=1)  # noqa: SIM115 - what it could not take it gives back when it is closed
    monkeypatch.setattr(sys, "stderr", log)
    record = train(tiny(), tmp_path, execution=Execution(checkpoint_seconds=0))
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        log.close()
    assert record["status"] == "finished"


def test_what_killed_processes_left_is_removed(tmp_path):
    with pytest.raises(Stopped):
        train(tiny(), tmp_path, should_stop=stop_after(3))
    for step in (2, 9):
        (tmp_path / f"checkpoint-{step:09d}").mkdir()
    for name in (".run.json.99.tmp", "averages/.step.99.tmp", ".mine.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    with pytest.raises(Stopped):
        train(tiny(), tmp_path, should_stop=stop_after(1))
    assert sorted(p.name for p in tmp_path.glob("*-0*")) == [
        f"checkpoint-00000000{s}{end}" for s in (3, 4) for end in ("", ".json")
    ]
    assert [p.name for p in tmp_path.rglob("*.tmp")] == [".mine.tmp"]


def test_shards_that_cannot_be_written_leave_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(InputError, match="expected a place to write, got"):
            save_shards(tmp_path, 5, {"weight": torch.zeros(1000)}, {}, Ranks(Execution()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_shards_that_cannot_be_read_again_are_said_to_all_ranks(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    class OneOfTwo(Ranks):
        def gather(self, value):
            return [{}, value]

    monkeypatch.setattr(shards, "file_sha256", fail)
    with pytest.raises(InputError, match="expected files that can be read again, got .*Input/output error"):
        save_shards(tmp_path, 5, {"weight": torch.zeros(10)}, {}, OneOfTwo(Execution()))
    assert not list(tmp_path.iterdir())


def test_metrics_that_cannot_be_written_wait(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = []
    log = MetricsLog(tmp_path / "metrics.jsonl", keep_to_step=0, say=said.append)
    rows = [{"step": i, "text": "x" * 40} for i in range(1, 7)]
    try:
        for row in rows:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100 if 2 <= row["step"] < 5 else soft, hard))
            log.append(row)
            found = read_metrics(tmp_path / "metrics.jsonl")
            assert found == (rows[:1] if 2 <= row["step"] < 5 else rows[: row["step"]])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
    assert len(said) == 1 and "its lines wait" in said[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs the rights of root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("full_at", [0, 5], ids=["from the start", "under way"])
def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, small_disk, full_at):
    config = tiny()
    whole = train(config, tmp_path / "whole")
    run, asked, said = small_disk / "run", [], []
    with pytest.raises(Stopped):
        train(config, run, should_stop=stop_after(3))

    def fill(asked=asked):
        if len(asked) == full_at:
            space = os.statvfs(small_disk)
            (small_disk / "film.mkv").write_bytes(b"\0" * (space.f_bavail * space.f_frsize))
        asked.append(1)
        return False

    if full_at == 0:
        fill()
    with pytest.raises(InputError, match="No space left on device"):
        train(config, run, execution=Execution(checkpoint_seconds=0), should_stop=fill, say=said.append)
    assert newest_checkpoint(run)[0].step == 3 + full_at
    assert full_at == 0 or "training goes on" in said[0]
    (small_disk / "film.mkv").unlink()
    assert result(train(config, run)) == result(whole)


def test_a_read_only_folder_is_named_and_does_no_harm(tmp_path, small_disk):
    config = tiny()
    whole = train(config, tmp_path / "whole")
    run = small_disk / "run"
    with pytest.raises(Stopped):
        train(config, run, should_stop=stop_after(3))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for folder in (run, small_disk / "new"):
        with pytest.raises(InputError, match="expected a folder to write to, got Read-only file system"):
            train(config, folder)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert result(train(config, run)) == result(whole)


def test_the_second_of_two_processes_refuses(tmp_path, monkeypatch):
    program = "import sys, time; from ditscale.dit.files import folder_lock\n"
    program += "with folder_lock(__import__('pathlib').Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-P", "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        monkeypatch.setattr(
            "ditscale.dit.training.loop.folder_lock", lambda folder: folder_lock(folder, wait_seconds=0.2)
        )
        with pytest.raises(InputError, match="no other process uses, got one in use"):
            train(tiny(), tmp_path)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert train(tiny(), tmp_path)["status"] == "finished"  # the lock went with its holder


TOML = """
images = 4000000
batch = 4
evaluation_images = 8
[model]
image_size = 16
latent_factor = 1
in_channels = 3
patch = 4
width = 16
depth = 1
heads = 2
condition = "none"
learn_sigma = false
[execution]
checkpoint_seconds = 1000
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signals_end_in_a_checkpoint_and_a_word_how_to_go_on(tmp_path, number):
    (tmp_path / "config.toml").write_text(TOML)
    run = tmp_path / "run"
    command = [sys.executable, "-P", "-m", "ditscale", "train", str(tmp_path / "config.toml"), "--out", str(run)]
    process = subprocess.Popen([*command, "--threads", "1", "--json"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    # The first line of metrics comes after 1/200 of the steps, which is long; the file itself comes with the first step.
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "stopped: run at step" in errors and "--resume" in errors
    found, complaints = newest_checkpoint(run)
    assert found.step > 0 and not complaints
    if number == signal.SIGINT:
        refused = subprocess.run([*command, "--json"], capture_output=True, text=True)
        assert refused.returncode == 2 and "give --resume to go on" in refused.stderr


def test_signals_to_the_whole_group_leave_data_workers_alone():
    """Ctrl-C reaches the group, and torchrun's SIGTERM; a worker that ended would cost the run its checkpoint."""
    config = tiny(batch=64, images=64 * 12)
    stream = open_stream(config, "train")
    feed = Feeder(config, stream, Ranks(Execution()), workers=1)
    try:
        feed(0)
        groups = [os.getpgid(child.pid) for child in multiprocessing.active_children()]
        assert groups and os.getpgid(0) not in groups
    finally:
        feed.close()
