"""Run by torchrun in the tests of distribution: every scenario of a JSON file, one after the other, in one process group.

A scenario: {"config": ..., "execution": ..., "out": ..., "stop_after": steps or null}.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from ditscale.dit.training import Execution, Stopped, TrainConfig, train

torch.set_num_threads(1)
dist.init_process_group("gloo")
for scenario in json.loads(Path(sys.argv[1]).read_text()):
    seen: list[int] = []
    after = scenario["stop_after"]
    with contextlib.suppress(Stopped):
        train(
            TrainConfig.from_dict(scenario["config"]),
            scenario["out"],
            execution=Execution.from_dict(scenario["execution"]),
            should_stop=None if after is None else lambda seen=seen, after=after: seen.append(1) or len(seen) == after,
        )
dist.destroy_process_group()
