"""What goes into a DiT beside the blocks: patches, positions, time and other scalars.

Shape suffixes: B batch, T tokens, D width, C channels, F frames, H and W sides of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.dit.layers import Linear, hold_table, is_bare
from ditscale.kernels import linear


class PatchEmbed(nn.Module):
    """Cut an image [B, C, H, W], or a video [B, C, F, H, W], into patches and bring each to the model's width.

    The weight has the shape of the convolution that the released models use, so their checkpoints load by name; the work
    is one matrix product over the patches, which is faster than a strided convolution on a CPU.

    Args:
        in_channels: C.
        patch: sides of a patch: (height, width), or (frames, height, width) for video.
        width: D.
    """

    def __init__(self, in_channels: int, patch: Sequence[int], width: int) -> None:
        super().__init__()
        self.patch = tuple(patch)
        convolution = nn.Conv2d if len(self.patch) == 2 else nn.Conv3d
        self.proj = convolution(in_channels, width, kernel_size=self.patch, stride=self.patch)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        if not is_bare(self.proj):
            return self.proj(x).flatten(2).transpose(1, 2)
        # [B, C, A, a, ...] to [B, A, ..., C, a, ...], A patches of a cells along each axis.
        axes = len(self.patch)
        grid = [size // p for size, p in zip(x.shape[2:], self.patch, strict=True)]
        split = [n for pair in zip(grid, self.patch, strict=True) for n in pair]
        order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
        x = x.reshape(*x.shape[:2], *split).permute(order)
        x = x.reshape(x.shape[0], math.prod(grid), -1)
        return linear(x, self.proj.weight.flatten(1), self.proj.bias)


def unpatchify(x_BTF: Tensor, channels: int, patch: Sequence[int], grid: Sequence[int]) -> Tensor:
    """[B, T, P*P*C] with the channel last inside a patch, to [B, C, H, W] (video: [B, C, F, H, W]).

    Args:
        channels: C.
        patch: sides of a patch, as in :class:`PatchEmbed`.
        grid: patches along the same axes.
    """
    axes = len(patch)
    x = x_BTF.reshape(x_BTF.shape[0], *grid, *patch, channels)
    order = [0, 1 + 2 * axes, *(i for axis in range(axes) for i in (1 + axis, 1 + axes + axis))]
    return x.permute(order).reshape(x.shape[0], channels, *(n * p for n, p in zip(grid, patch, strict=True)))


class ScalarEmbed(nn.Module):
    """Sines and cosines of a number of each sample, then two linear layers with SiLU between: the time, the guidance."""

    frequencies: Tensor

    def __init__(self, width: int, frequency_width: int = 256, *, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.frequency_width, self.max_period = frequency_width, max_period
        self.make_tables()
        self.mlp = vector_mlp(frequency_width, width)

    def make_tables(self) -> None:
        """The frequencies."""
        half = self.frequency_width // 2
        frequencies = torch.exp(-math.log(self.max_period) * torch.arange(half, dtype=torch.float64) / half)
        hold_table(self, "frequencies", frequencies.float())

    def forward(self, t_B: Tensor) -> Tensor:
        angles = t_B.float()[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(next(self.parameters()).dtype))


class VectorEmbed(nn.Module):
    """A vector of each sample through two linear layers with SiLU between: the pooled caption."""

    def __init__(self, fan_in: int, width: int) -> None:
        super().__init__()
        self.mlp = vector_mlp(fan_in, width)

    def forward(self, vector_BV: Tensor, drop_B: Tensor | None) -> Tensor:
        if drop_B is not None:
            vector_BV = vector_BV.masked_fill(drop_B[:, None], 0)
        return self.mlp(vector_BV.to(next(self.parameters()).dtype))


def vector_mlp(fan_in: int, width: int) -> nn.Sequential:
    """Linear, SiLU, Linear."""
    return nn.Sequential(Linear(fan_in, width), nn.SiLU(), Linear(width, width))


def axis_table(width: int, length: int) -> Tensor:
    """Sines, then cosines, of the places on one axis: [length, width] float64; an odd width ends in zeros."""
    half = width // 2
    omega = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * omega
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def position_table(width: int, grid: Sequence[int]) -> Tensor:
    """Fixed sine-cosine positions of a grid of (frames, rows, columns), [tokens, width] float32.

    The first half of the width holds the column, the second the row, as in the released DiT ("w goes first"); in each
    half sines stand before cosines. A video adds the same table of its frame over the whole width (Latte,
    arXiv:2401.03048). Computed in float64.
    """
    frames, rows, columns = grid
    across = axis_table(width // 2, columns)[None, None, :, :].expand(frames, rows, columns, -1)
    down = axis_table(width // 2, rows)[None, :, None, :].expand(frames, rows, columns, -1)
    table = torch.cat([across, down], dim=-1)
    if frames > 1:
        table = table + axis_table(width, frames)[:, None, None, :]
    return table.reshape(-1, width).float()
