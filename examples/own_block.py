"""Use the fused operators in a block of your own: the lines that read and write memory become two calls.

Run: python examples/own_block.py
"""

import torch
from torch import nn

from ditscale.kernels import attention, gate_residual, gate_residual_layernorm_modulate, layernorm_modulate


class Block(nn.Module):
    """A DiT block with adaLN-zero whose normalisations, modulations and gates are fused."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=1)
        y = layernorm_modulate(x, shift_a, scale_a)
        q, k, v = self.qkv(y).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y = self.proj(attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        x, y = gate_residual_layernorm_modulate(x, y, gate_a, shift_m, scale_m)
        return gate_residual(x, self.mlp(y), gate_m)


if __name__ == "__main__":
    torch.manual_seed(0)
    block, x, c = Block(384, 6), torch.randn(4, 256, 384, requires_grad=True), torch.randn(4, 384)
    block(x, c).square().mean().backward()
    print(f"gradient of the input: {tuple(x.grad.shape)}, norm {float(x.grad.norm()):.4g}")
