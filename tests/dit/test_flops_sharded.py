"""Counting models that several processes share: each rank's own work, and the whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import flops_ranks as ranks
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from ditscale.dit.flops import trace
from ditscale.errors import InputError


def test_two_processes_over_gloo(tmp_path: Path) -> None:
    """Torch's counter takes a sharded product for a whole one, on every rank: summed over ranks that is twice too much."""
    store = str(tmp_path / "store")
    other = subprocess.Popen(
        [sys.executable, ranks.__file__, "1", store],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    try:
        ours = ranks.measure(0, store)
        out, err = other.communicate(timeout=120)
    finally:
        other.kill()
    assert other.returncode == 0, err
    theirs = json.loads(out)
    once = 2 * ranks.ROWS * 2 * ranks.WIDTH * ranks.HIDDEN
    whole = [once, 2 * once - once // 2]  # nobody needs the first input's gradient
    for found in (ours, theirs):
        assert found["torch"] == found["global"] == found["replica"] == whole
        assert found["local"] == [whole[0] // 2, whole[1] // 2]


@pytest.fixture
def group() -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_sharded_attention_counts_its_heads() -> None:
    """Heads spread over ranks: the batched products of attention are shared out too."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.out(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).flatten(2))

    x = torch.zeros(2, 5, 8)
    whole = trace(Attention(), x)
    plan = {**dict.fromkeys("qkv", ColwiseParallel()), "out": RowwiseParallel()}
    model = parallelize_module(Attention(), init_device_mesh("cpu", (2,)), plan)
    report = trace(model, x)
    assert (2 * report.forward, 2 * report.backward) == (whole.forward, whole.backward)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["fully_shard", "FullyShardedDataParallel"])
def test_fsdp_is_an_error_that_says_what_to_do(kind: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    model: nn.Module = ranks.plain()
    if kind == "fully_shard":
        fully_shard(model[0], mesh=init_device_mesh("cpu", (2,)))  # type: ignore[index]
    else:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    with pytest.raises(InputError, match="model: .*trace it before fully_shard"):
        trace(model, torch.zeros(ranks.ROWS, ranks.WIDTH))
