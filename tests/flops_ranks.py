"""One of two processes that share a tensor-parallel model over gloo: what torch's counter says there, and what we say.

Run as ``python flops_ranks.py RANK STORE``; prints one JSON object.
"""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.flop_counter import FlopCounterMode

from ditscale.dit.flops import trace

WORLD, ROWS, WIDTH, HIDDEN = 2, 4, 8, 16


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))


def measure(rank: int, store: str) -> dict[str, list[int]]:
    """(forward, backward) by way of counting; the group is left as it was found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    try:
        x = torch.zeros(ROWS, WIDTH)
        replicas = trace(nn.parallel.DistributedDataParallel(plain()), x)
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        model = parallelize_module(plain(), init_device_mesh("cpu", (WORLD,)), plan)
        local, whole = trace(model, x), trace(model, x, sharded="global")
        with FlopCounterMode(display=False) as counter:
            y = model(x)
            forward = counter.get_total_flops()
            y.sum().backward()
        found = {"replica": replicas, "local": local, "global": whole}
        return {name: [report.forward, report.backward] for name, report in found.items()} | {
            "torch": [forward, counter.get_total_flops() - forward]
        }
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
