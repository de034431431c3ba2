"""Trains one run again and again in forked children that are killed, each at a moment of its own; for the tests of training.

Arguments: the run's configuration (JSON), the folder, the number of rounds, a seed. Prints one JSON line a round: how the
child was to end, whether it finished, where it began, the newest checkpoint before and after. A run that finishes is moved
aside and begins anew.

The process imports and warms everything once; a forked child then begins in milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from ditscale.dit import checkpoint, files
from ditscale.dit.flow import ValidationSet
from ditscale.dit.training import Execution, TrainConfig, train
from ditscale.dit.training.step import Stepper

torch.set_num_threads(1)
CONFIG = TrainConfig.from_dict(json.loads(Path(sys.argv[1]).read_text()))
EXECUTION = Execution(checkpoint_seconds=0.003, validate_every=7)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Torn:
    """A file of which a write is cut in the middle when it is time to die."""

    def __init__(self, file, due):
        self._file, self._due = file, due

    def write(self, data):
        if self._due():
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            die()
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()


def after(calls):
    """A function that says yes at its n-th call."""
    left = [calls]

    def due():
        left[0] -= 1
        return left[0] < 0

    return due


def arm(kind, draw):
    """Prepare the child to die in the middle of one sort of work."""
    if kind == "step":
        gradients, due = Stepper.gradients, after(draw.randrange(30))

        def step(self, inputs):
            found = gradients(self, inputs)
            if due():
                die()
            return found

        Stepper.gradients = step
    elif kind == "evaluation":
        batches, due = ValidationSet.batches, after(draw.randrange(40))

        def cut(self, batch=64):
            for item in batches(self, batch):
                if due():
                    die()
                yield item

        ValidationSet.batches = cut
    elif kind == "write":  # of a checkpoint, a metrics line, a record, the weights
        due = after(draw.randrange(60))
        for module in (files, checkpoint):
            module.open = lambda *args, **settings: Torn(open(*args, **settings), due)  # noqa: SIM115
    elif kind == "rename":
        replace, due = os.replace, after(draw.randrange(30))

        def renamed(*args):
            if due():
                die()
            replace(*args)
            if due():
                die()

        os.replace = renamed


def newest(folder):
    steps = [int(p.stem.removeprefix("checkpoint-")) for p in folder.glob("checkpoint-*.json")]
    return max(steps, default=0)


def child(kind, draw, folder, report):
    arm(kind, draw)
    first = []

    def progress(done, steps, loss):
        if not first:
            first.append(done)
            os.write(report, f"{done - 1} ".encode())

    train(CONFIG, folder, execution=EXECUTION, progress=progress, say=lambda sentence: None)
    os.write(report, b"finished")
    os._exit(0)


def main():
    folder, rounds, draw = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    train(CONFIG, folder / "whole", execution=EXECUTION)
    run, done = folder / "run", 0
    for number in range(rounds):
        kind = ("time", "step", "evaluation", "write", "rename")[number % 5]
        before = newest(run)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            child(kind, draw, run, write)
        os.close(write)
        if kind == "time":
            time.sleep(draw.uniform(0, 0.12))
            os.kill(pid, signal.SIGKILL)
        draw.randrange(60)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as pipe:
            told = pipe.read().split()
        finished = (run / "run.json").exists()
        if told and told[-1] == "finished":
            assert finished
        begun = int(told[0]) if told and told[0] != "finished" else None
        line = {"kind": kind, "killed": os.WIFSIGNALED(status), "finished": finished, "begun": begun}
        print(json.dumps(line | {"before": before, "after": newest(run)}), flush=True)
        if finished:
            run.rename(folder / f"finished-{done}")
            done += 1


main()
