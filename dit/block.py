"""The DiT block with adaLN-zero, and the output layer. Shape suffixes as in embed.py; H heads, K head width.

The memory-bound lines are the fused operators of ``ditscale.kernels``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.kernels import attention, bias_gelu, gate_residual_layernorm_modulate, layernorm_modulate


class Attention(nn.Module):
    """Bidirectional self-attention of H heads with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        q_BHTK, k_BHTK, v_BHTK = self.qkv(x_BTD).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        y_BHTK = attention(q_BHTK, k_BHTK, v_BHTK)
        return self.proj(y_BHTK.transpose(1, 2).reshape(b, t, d))


class Mlp(nn.Module):
    """Two linear layers with the tanh form of GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.fc2(bias_gelu(F.linear(x_BTD, self.fc1.weight), self.fc1.bias))


class Modulation(nn.Module):
    """SiLU and a linear layer, from the condition to ``parts`` vectors a sample; starts at zero."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        # Named like the released model's nn.Sequential(SiLU, Linear), whose linear layer is number 1.
        self.add_module("1", nn.Linear(width, parts * width))

    @property
    def linear(self) -> nn.Linear:
        """The layer that its name in the released model hides."""
        return self.get_submodule("1")  # type: ignore[return-value]

    def forward(self, c_silu_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(c_silu_BD).chunk(self.parts, dim=1)


class DiTBlock(nn.Module):
    """Attention and feed-forward, each normalised, modulated and gated by the condition.

    ``forward`` takes the stream and the branch that the block before has not added yet, with its gate, and hands the
    same on: so that adding a branch, normalising the sum and modulating it are one fused operator.
    """

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = Mlp(width, mlp_width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(
        self, x_BTD: Tensor, pending: tuple[Tensor, Tensor] | None, c_silu_BD: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_silu_BD)
        x_BTD, y_BTD = add_and_modulate(x_BTD, pending, shift_a, scale_a)
        x_BTD, y_BTD = add_and_modulate(x_BTD, (self.attn(y_BTD), gate_a), shift_m, scale_m)
        return x_BTD, (self.mlp(y_BTD), gate_m)


class FinalLayer(nn.Module):
    """The last modulated normalisation, and the linear layer to patches."""

    def __init__(self, width: int, patch: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * out_channels)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x_BTD: Tensor, pending: tuple[Tensor, Tensor] | None, c_silu_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_silu_BD)
        _, y_BTD = add_and_modulate(x_BTD, pending, shift, scale)
        return self.linear(y_BTD)


def add_and_modulate(
    x_BTD: Tensor, pending: tuple[Tensor, Tensor] | None, shift_BD: Tensor, scale_BD: Tensor
) -> tuple[Tensor, Tensor]:
    """Add the pending gated branch, if any; return the stream and its normalised, modulated value."""
    if pending is None:
        return x_BTD, layernorm_modulate(x_BTD, shift_BD, scale_BD)
    branch_BTD, gate_BD = pending
    return gate_residual_layernorm_modulate(x_BTD, branch_BTD, gate_BD, shift_BD, scale_BD)
