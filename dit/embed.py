"""What goes into a DiT beside the blocks: patches, positions, time, label and caption.

Shape suffixes: B batch, T tokens, D width, C channels, H and W sides of the input, K caption words.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Cut an image into patches and bring each to the model's width.

    The weight has the shape of the convolution that the released DiT uses, so its checkpoints load by name; the work
    is one matrix product over the patches, which is faster than a strided convolution on a CPU.
    """

    def __init__(self, in_channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        b, c, h, w = x_BCHW.shape
        p = self.patch
        x = x_BCHW.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, (h // p) * (w // p), c * p * p)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbed(nn.Module):
    """Sines and cosines of the time, then two linear layers with SiLU between."""

    def __init__(self, width: int, frequency_width: int = 256, *, max_period: float = 10_000.0) -> None:
        super().__init__()
        half = frequency_width // 2
        frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float64) / half)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(frequency_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        angles = t_B.float()[:, None] * self.frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbed(nn.Module):
    """A row for each class, and one more, the last, for "no label"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor, drop_B: Tensor | None) -> Tensor:
        if drop_B is not None:
            labels_B = torch.where(drop_B, self.num_classes, labels_B)
        return self.embedding_table(labels_B)


class CaptionEmbed(nn.Module):
    """The mean of a caption's word vectors, brought to the model's width. Word 0 is padding.

    A dropped or empty caption gives the zero vector before the linear layer, so its bias stands for "no caption".
    """

    def __init__(self, vocabulary_size: int, caption_width: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(vocabulary_size, caption_width)
        self.proj = nn.Linear(caption_width, width)

    def forward(self, words_BK: Tensor, drop_B: Tensor | None) -> Tensor:
        if drop_B is not None:
            words_BK = words_BK.masked_fill(drop_B[:, None], 0)
        present_BK1 = (words_BK != 0).unsqueeze(-1).to(self.embedding_table.weight.dtype)
        total = (self.embedding_table(words_BK) * present_BK1).sum(1)
        return self.proj(total / present_BK1.sum(1).clamp(min=1))


def position_table(width: int, side: int) -> Tensor:
    """Fixed two-dimensional sine-cosine positions, [side * side, width] float32.

    The first half of the width holds the column, the second the row, as in the released DiT ("w goes first"); in each
    half sines stand before cosines. Computed in float64.
    """
    quarter = width // 4
    omega = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None, :, :].expand(side, side, -1)
    rows = axis[:, None, :].expand(side, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(side * side, width).float()


def unpatchify(x_BTF: Tensor, channels: int, patch: int) -> Tensor:
    """[B, T, P*P*C] with the channel last inside a patch, to [B, C, H, W]."""
    b, t, _ = x_BTF.shape
    side = math.isqrt(t)
    x = x_BTF.reshape(b, side, side, patch, patch, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, channels, side * patch, side * patch)
