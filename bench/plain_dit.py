"""A DiT in plain PyTorch, the baseline of the block and step benchmarks: what a careful user writes without this library.

Stated from the paper (Peebles & Xie, arXiv:2212.09748), with nothing of ``ditscale.dit`` or ``ditscale.kernels``: layer norm,
modulation and gates as separate lines, PyTorch's own attention and GELU. Parameters bear the released model's names, so the
weights of either model load into the other and the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """[B, T, D] by [B, D]."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PlainAttention(nn.Module):
    """Self-attention through PyTorch's scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D))
        return y


class PlainMlp(nn.Module):
    """Two linear layers, tanh GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class PlainBlock(nn.Module):
    """The block with adaLN-zero."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = PlainAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = PlainMlp(width, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class PlainFinal(nn.Module):
    """Modulated norm and the layer to patches."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        y: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return y


class _Patches(nn.Module):
    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return y


class _Time(nn.Module):
    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.features // 2
        # Rounded once: a time of 1,000 makes the last digit of a frequency the fifth of its angle.
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angles = t[:, None].float() * frequencies.float()
        y: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))
        return y


class _Labels(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor, drop: Tensor | None) -> Tensor:
        found: Tensor = self.embedding_table(y if drop is None else torch.where(drop, self.classes, y))
        return found


class PlainDiT(nn.Module):
    """A class-conditional DiT.

    Args:
        side: of the input; [B, channels, side, side].
        channels, patch, width, depth, heads: as in the paper; the mlp is four times as wide.
        classes: labels 0 to classes - 1.
    """

    def __init__(
        self, *, side: int, channels: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.x_embedder = _Patches(channels, patch, width)
        self.t_embedder = _Time(width, 256)
        self.y_embedder = _Labels(classes, width)
        self.register_buffer("pos_embed", _positions(width, side // patch))
        self.blocks = nn.ModuleList(PlainBlock(width, heads, 4 * width) for _ in range(depth))
        self.final_layer = PlainFinal(width, patch * patch * channels)

    @classmethod
    def of(cls, config: Any) -> PlainDiT:
        """The one of the sizes of a ``DiTConfig``."""
        c = config
        return cls(
            side=c.input_side, channels=c.in_channels, patch=c.patch,
            width=c.width, depth=c.depth, heads=c.heads, classes=c.num_classes,
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor, drop: Tensor | None = None) -> Tensor:
        """x [B, C, S, S], t [B] from 0 to 1000, y [B] labels, drop [B] bool; returns the shape of x."""
        B, C, S, _ = x.shape
        n = S // self.patch
        h = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, drop)
        for block in self.blocks:
            h = block(h, c)
        out: Tensor = self.final_layer(h, c).reshape(B, n, n, self.patch, self.patch, C)
        return torch.einsum("nhwpqc->nchpwq", out).reshape(B, C, S, S)


def _positions(width: int, side: int) -> Tensor:
    """Sines and cosines of column, then of row."""
    omega = 1.0 / 10_000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    parts = [f(axis.reshape(-1, 1) * omega) for axis in (column, row) for f in (torch.sin, torch.cos)]
    return torch.cat(parts, dim=1).float().unsqueeze(0)


class PlainTrainer:
    """The training step of a plain script: rectified flow loss, gradients, clipping, AdamW, moving average of the weights.

    Args:
        model: a PlainDiT, or its compiled form.
        parameters: of the model.
        tuned: use PyTorch's fused AdamW and one grouped call for the average; otherwise AdamW as it comes and a loop over the
            parameters for the average, as the released training script has them. Default: True.
        dtype: of the model's arithmetic: float32, or bfloat16 through autocast. Default: float32.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        *,
        tuned: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.model, self.parameters, self.tuned, self.dtype = model, list(parameters), tuned, dtype
        self.average = [p.detach().clone() for p in self.parameters]
        more = {"fused": True} if tuned else {}
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, **more)

    def loss(self, x_0: Tensor, y: Tensor, eps: Tensor, t: Tensor, drop: Tensor) -> Tensor:
        """Mean squared error of the velocity eps - x_0 at (1 - t) x_0 + t eps."""
        at = t.view(-1, 1, 1, 1)
        with torch.autocast(x_0.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            predicted = self.model((1 - at) * x_0 + at * eps, t * 1000, y, drop)
        return F.mse_loss(predicted.float(), eps - x_0)

    def step(self, x_0: Tensor, y: Tensor, eps: Tensor, t: Tensor, drop: Tensor) -> Tensor:
        """One step; returns the loss."""
        loss = self.loss(x_0, y, eps, t, drop)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if self.tuned:
                torch._foreach_lerp_(self.average, self.parameters, 1e-4)
            else:
                for kept, new in zip(self.average, self.parameters, strict=True):
                    kept.mul_(0.9999).add_(new, alpha=1e-4)
        return loss.detach()
