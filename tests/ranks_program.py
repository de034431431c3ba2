"""The processes of the tests of distribution: ``ranks_program.py LAUNCHES.json`` forks the ranks of one launch after another.

A launch: {"ranks": how many, "copy": [from, to] or null, "scenarios": [...]}; the folder is copied before the ranks start, and
they go through the scenarios in one process group. A scenario: {"config": ..., "execution": ..., "out": ..., "stop_after": steps
or null}. With "patience": [s, t] the group gives up after s seconds, and the first rank works t seconds alone before all else.
They are forked, not started by torchrun, since importing torch takes longer than all their training; examples/more_gpus.py, which
is a test too, trains under torchrun.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp

from ditscale.dit.training import Execution, Stopped, TrainConfig, shards, train  # noqa: F401 - shards: imported before the fork
from ditscale.dit.training.ranks import Ranks


def work(rank: int, launch: dict[str, Any], store: str) -> None:
    """One rank's part of a launch."""
    count = launch["ranks"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count))
    torch.set_num_threads(1)
    limit, alone = launch.get("patience", (1800, 0))
    timeout = datetime.timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    if Ranks(Execution()).on_first(lambda: time.sleep(alone) or alone) != alone:
        raise RuntimeError("a rank did not hear of the first one's work")
    for scenario in launch["scenarios"]:
        seen: list[int] = []
        after = scenario["stop_after"]
        with contextlib.suppress(Stopped):
            train(
                TrainConfig.from_dict(scenario["config"]),
                scenario["out"],
                execution=Execution.from_dict(scenario["execution"]),
                should_stop=None
                if after is None
                else lambda seen=seen, after=after: seen.append(1) or len(seen) == after,
            )
    dist.destroy_process_group()


def fork(rank: int, launch: dict[str, Any], store: str) -> int:
    """The child's process id; the child itself ends here."""
    if child := os.fork():
        return child
    code = 1
    try:
        work(rank, launch, store)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main(launches: Path) -> int:
    """Every launch; the exit code says whether all ranks of all went through."""
    for number, launch in enumerate(json.loads(launches.read_text())):
        if launch["copy"]:
            shutil.copytree(*launch["copy"])
        store = str(launches.with_name(f"store-{number}"))
        children = {fork(rank, launch, store) for rank in range(launch["ranks"])}
        while children:
            child, status = os.wait()
            children.remove(child)
            if status:  # the others would wait for it
                for other in children:
                    os.kill(other, signal.SIGKILL)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
