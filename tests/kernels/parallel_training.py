"""One process of a pair: gradients of a block under DistributedDataParallel and FSDP2, written for the test to compare.

python parallel_training.py RANK STORE OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from cases import block, plain_block

from ditscale.kernels import dispatch, linear

SAMPLES, TOKENS, WIDTH, PROCESSES = 4, 9, 16, 2


class Linear(torch.nn.Linear):
    """By our own products where they serve, however small: in float32."""

    def forward(self, x: Tensor) -> Tensor:
        serves = x.dtype == torch.float32 and dispatch.unavailable_reason("linear", "cpu", "cpu") is None
        return linear(x, self.weight, self.bias, backend="cpu" if serves else "auto")


class Block(torch.nn.Module):
    """A conditioned block with a layer in its branch. Equal on every process."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.modulate = Linear(WIDTH, 3 * WIDTH)
        self.layer = Linear(WIDTH, WIDTH)
        self.bias = torch.nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor, c: Tensor, plain: bool = False) -> Tensor:
        leaves = x, self.layer(x), self.modulate(c), self.bias
        return plain_block(*leaves) if plain else block(*leaves, "auto")


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(SAMPLES, TOKENS, WIDTH, generator=g), torch.randn(SAMPLES, WIDTH, generator=g)


def gradients(module: torch.nn.Module, x: Tensor, c: Tensor, **options: bool) -> dict[str, Tensor]:
    module(x, c, **options).square().mean().backward()
    found = {}
    for name, p in module.named_parameters():
        g = p.grad
        assert g is not None, name
        found[name.removeprefix("module.")] = g.full_tensor() if hasattr(g, "full_tensor") else g
    return found


def main(rank: int, store: str, out: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    half = SAMPLES // PROCESSES
    x, c = (t[rank * half : (rank + 1) * half] for t in data())
    found = {"ddp": gradients(torch.nn.parallel.DistributedDataParallel(Block()), x, c)}
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    found["fsdp2"] = gradients(fully_shard(Block(), mesh=mesh), x, c)
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found["fsdp2 bfloat16"] = gradients(fully_shard(Block(), mesh=mesh, mp_policy=halves), x, c)
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
