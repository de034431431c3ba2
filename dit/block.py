"""The block of one stream in every variant, and the output layer. Shape suffixes as in layers.py; n vectors of a block.

A block takes the stream and the branch that the block before has not added yet, with its gate, and hands the same on: so that
adding a branch, normalising the sum and modulating it are one fused operator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ditscale.dit.config import DiTConfig
from ditscale.dit.layers import Attention, CrossAttention, Linear, Mlp, Modulation, Norm, Pending, Turns, settle
from ditscale.dit.moe import Mixture

# Shift, scale and gate of a branch, [B, D] each; None where a branch has none.
Vectors = tuple[Tensor | None, Tensor | None, Tensor | None]


class Around(NamedTuple):
    """What blocks see beside their stream.

    Attributes:
        context: tokens for cross-attention, [B, S, D], or None.
        context_lengths: how many of them count, [B], or None for all.
        lengths: how many tokens of the stream itself count, [B], or None for all.
        turns: rotary position embedding of all tokens, or None.
        space, time: the same within a frame and along time, where the model attends so.
    """

    context: Tensor | None = None
    context_lengths: Tensor | None = None
    lengths: Tensor | None = None
    turns: Turns | None = None
    space: Turns | None = None
    time: Turns | None = None


NOTHING_AROUND = Around()


class DiTBlock(nn.Module):
    """Attention and feed-forward, each normalised, modulated and gated as the configuration says.

    What a configuration adds: attention along time after that within frames, cross-attention, and a mixture of experts for
    the feed-forward layer.

    Args:
        config: the model.
        index: of the block; it decides what alternates. Default: 0.
    """

    temporal: Attention
    norm_temporal: Norm

    def __init__(self, config: DiTConfig, index: int = 0) -> None:
        super().__init__()
        d = config.width
        self.frames = config.grid(config.image_size, config.image_width)[0]
        self.modulation = config.modulation
        self.attends: tuple[str, ...] = (config.attention,)
        if config.attention == "space-time":
            self.attends = ("space", "time")
        elif config.attention == "alternating":
            self.attends = ("time" if index % 2 else "space",)

        def norm() -> Norm:
            return Norm(d, config.norm, affine=config.modulation == "none")

        self.attn, self.norm1 = Attention(config), norm()
        if len(self.attends) == 2:
            self.temporal, self.norm_temporal = Attention(config), norm()
        self.crosses = config.context == "cross-attention"
        if self.crosses:
            self.cross_attn = CrossAttention(config)
            self.cross_norm = Norm(d, config.norm, affine=True) if config.cross_norm else None
        self.mlp: Mlp | Mixture
        if config.experts and index % config.moe_every == 0:
            self.mlp = Mixture(config)
        else:
            self.mlp = Mlp(d, config.mlp_width, d, swiglu=config.mlp == "swiglu")
        self.norm2 = norm()
        branches = len(self.attends) + 1
        if config.modulation == "adaln-single":
            self.scale_shift_table = nn.Parameter(torch.zeros(3 * branches, d))
        elif config.modulation != "none":
            self.adaLN_modulation = Modulation(d, branches * (3 if config.modulation == "adaln-zero" else 2))

    def vectors(self, c: Tensor | None) -> list[Vectors]:
        """Shift, scale and gate of each branch."""
        if c is None:
            return [(None, None, None)] * (len(self.attends) + 1)
        if self.modulation == "adaln-single":
            found = (self.scale_shift_table + c).unbind(1)
        else:
            found = self.adaLN_modulation(c)
        if self.modulation == "adaln":
            return [(shift, scale, None) for shift, scale in zip(found[::2], found[1::2], strict=True)]
        return list(zip(found[::3], found[1::3], found[2::3], strict=True))

    def forward(
        self, x_BTD: Tensor, pending: Pending | None, c: Tensor | None, around: Around = NOTHING_AROUND
    ) -> tuple[Tensor, Pending]:
        """The stream, and the feed-forward branch that is still to be added.

        Args:
            x_BTD: the stream.
            pending: the branch before, or None.
            c: SiLU of the condition [B, D] (adaLN-zero, adaLN), the shared vectors [B, n, D] (adaLN-single), or None.
            around: what else the block sees. Default: nothing.
        """
        balance = None if pending is None else pending.balance
        *attention_vectors, (shift, scale, gate) = self.vectors(c)
        for i, (along, (a_shift, a_scale, a_gate)) in enumerate(zip(self.attends, attention_vectors, strict=True)):
            layer, norm = (self.temporal, self.norm_temporal) if i else (self.attn, self.norm1)
            x_BTD, y_BTD = norm(x_BTD, pending, a_shift, a_scale)
            pending = Pending(self.attend(layer, along, y_BTD, around), a_gate)
        if self.crosses:
            if self.cross_norm is None:
                x_BTD = y_BTD = settle(x_BTD, pending)
            else:
                x_BTD, y_BTD = self.cross_norm(x_BTD, pending)
            pending = Pending(self.cross_attn(y_BTD, around.context, around.context_lengths), None)
        x_BTD, y_BTD = self.norm2(x_BTD, pending, shift, scale)
        if not isinstance(self.mlp, Mixture):
            return x_BTD, Pending(self.mlp(y_BTD), gate, balance)
        y_BTD, more = self.mlp(y_BTD, around.lengths)
        return x_BTD, Pending(y_BTD, gate, more if balance is None else balance + more)

    def attend(self, layer: Attention, along: str, y_BTD: Tensor, around: Around) -> Tensor:
        """Self-attention over everything, within each frame, or along time at each place of a frame."""
        if along == "full":
            return layer(y_BTD, around.lengths, around.turns)
        b, t, d = y_BTD.shape
        if along == "space":
            return layer(y_BTD.view(b * self.frames, -1, d), None, around.space).view(b, t, d)
        y = y_BTD.view(b, self.frames, -1, d).transpose(1, 2).reshape(-1, self.frames, d)
        y = layer(y, None, around.time)
        return y.view(b, -1, self.frames, d).transpose(1, 2).reshape(b, t, d)


class FinalLayer(nn.Module):
    """The last norm, modulated as the blocks' are, and the linear layer to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d = config.width
        self.modulation = config.modulation
        self.norm_final = Norm(d, config.norm, affine=config.modulation == "none")
        self.linear = Linear(d, config.patch_frames * config.patch**2 * config.out_channels)
        if config.modulation == "adaln-single":
            self.scale_shift_table = nn.Parameter(torch.zeros(2, d))
        elif config.modulation != "none":
            self.adaLN_modulation = Modulation(d, 2)

    def forward(self, x_BTD: Tensor, pending: Pending | None, c_BD: Tensor, c_silu_BD: Tensor | None) -> Tensor:
        """[B, T, patch_frames * P * P * C_out]; adaLN-single takes the condition as it is, adaLN its SiLU."""
        shift = scale = None
        if self.modulation == "adaln-single":
            shift, scale = (self.scale_shift_table + c_BD.unsqueeze(1)).unbind(1)
        elif c_silu_BD is not None:
            shift, scale = self.adaLN_modulation(c_silu_BD)
        _, y_BTD = self.norm_final(x_BTD, pending, shift, scale)
        return self.linear(y_BTD)
