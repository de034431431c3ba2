"""The layers that blocks are made of. Shape suffixes: B batch, T tokens, S other tokens, D width, H heads, K head width.

The memory-bound lines are the fused operators of ``ditscale.kernels``.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.dit.config import DiTConfig
from ditscale.kernels import (
    attention,
    attention_qkv,
    bias_gelu,
    gate_residual,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
    linear,
    qk_norm_rope,
)


class Linear(nn.Linear):
    """``torch.nn.Linear`` by the fastest products on this processor."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)


def is_bare(layer: nn.Module) -> bool:
    """Whether a layer is its weight and bias and no more, so that they may be taken without calling it.

    It is not where something stands in its place or around it: an adapter such as LoRA's, a quantised layer, a hook, another
    forward (as offloading sets it).
    """
    around = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    own = type(layer) in (Linear, nn.Linear, nn.Conv2d, nn.Conv3d) and "forward" not in layer.__dict__
    return own and not around


def hold_table(module: nn.Module, name: str, table: Tensor, *, saved: bool = False) -> None:
    """Give a module a fixed table, with the device and dtype of the one that it held under that name, if any.

    saved: part of the state dict, as in the released models. Default: False, as it follows from the configuration.
    """
    before = getattr(module, name, None)
    module.register_buffer(name, table if before is None else table.to(before), persistent=saved)


class Pending(NamedTuple):
    """A branch that has not been added to its stream yet: adding it and normalising the sum are one operator.

    Attributes:
        branch: [B, T, D].
        gate: [B, D], or None where the branch is added as it is.
        balance: sum of the balance losses of the mixtures so far, a scalar; None where there was none.
    """

    branch: Tensor
    gate: Tensor | None
    balance: Tensor | None = None


class Turns(NamedTuple):
    """Cosines and sines of the rotary position embedding, [T, K / 2] each."""

    cos: Tensor
    sin: Tensor


def settle(x_BTD: Tensor, pending: Pending | None) -> Tensor:
    """The stream with the pending branch, if any, added."""
    if pending is None:
        return x_BTD
    if pending.gate is None:
        return x_BTD + pending.branch
    return gate_residual(x_BTD, pending.branch, pending.gate)


class Norm(nn.Module):
    """Add the pending branch, then normalise: with a shift and scale of each sample, or with weights of its own.

    Args:
        width: D.
        kind: "layer" or "rms".
        affine: has a weight (LayerNorm: and a bias) instead of being modulated.
    """

    def __init__(self, width: int, kind: str, *, affine: bool) -> None:
        super().__init__()
        self.kind: Literal["layer", "rms"] = "rms" if kind == "rms" else "layer"
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine and kind == "layer" else None

    def forward(
        self, x_BTD: Tensor, pending: Pending | None, shift_BD: Tensor | None = None, scale_BD: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(the stream with the branch added, its normalised value)."""
        if shift_BD is None or scale_BD is None:
            shift_BD = scale_BD = x_BTD.new_zeros(x_BTD.shape[-1])
        weight, bias, norm = self.weight, self.bias, self.kind
        if pending is not None and pending.gate is not None:
            branch, gate = pending.branch, pending.gate
            return gate_residual_layernorm_modulate(
                x_BTD, branch, gate, shift_BD, scale_BD, weight=weight, bias=bias, norm=norm
            )
        x_BTD = settle(x_BTD, pending)
        return x_BTD, layernorm_modulate(x_BTD, shift_BD, scale_BD, weight=weight, bias=bias, norm=norm)


class QKNorm(nn.Module):
    """RMS norm's weight for queries or keys: over a head's width ("head"), or over all heads together ("width")."""

    def __init__(self, kind: str, heads: int, head_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_width if kind == "head" else heads * head_width))

    def over_width(self, x_BTHK: Tensor) -> Tensor:
        """The norm over all heads of a token."""
        x_BTD = x_BTHK.flatten(2)
        zero = x_BTD.new_zeros(x_BTD.shape[-1])
        return layernorm_modulate(x_BTD, zero, zero, weight=self.weight, norm="rms").view(x_BTHK.shape)


class Heads(nn.Module):
    """What every attention has: its heads, its output layer, and norms of queries and keys."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.heads, self.key_heads = config.heads, config.key_heads
        self.head_width, self.qk_norm = config.width // config.heads, config.qk_norm

    def add_output(self, config: DiTConfig, *, proj: bool = True) -> None:
        """The layers after the projection to queries and keys; after it, so that weights are drawn in their order."""
        if proj:
            self.proj = Linear(config.width, config.width)
        if self.qk_norm != "none":
            self.q_norm = QKNorm(self.qk_norm, self.heads, self.head_width)
            self.k_norm = QKNorm(self.qk_norm, self.key_heads, self.head_width)

    def norm_and_turn(self, q_BTHK: Tensor, k_BTGK: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor]:
        """Normalised and turned, [B, H, T, K] and [B, G, T, K]."""
        if self.qk_norm == "width":
            q_BTHK, k_BTGK = self.q_norm.over_width(q_BTHK), self.k_norm.over_width(k_BTGK)
        q, k = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2)
        if self.qk_norm == "head":
            return qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, *(turns or (None, None)))
        return (q, k) if turns is None else qk_norm_rope(q, k, cos=turns.cos, sin=turns.sin, norm="none")

    def split(self, qkv: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys and values [B, G, T, K] from what the projection gave, [B, T, (H + 2 G) K]."""
        h, g = self.heads, self.key_heads
        q, k, v = qkv.unflatten(2, (h + 2 * g, self.head_width)).split([h, g, g], dim=2)
        return *self.norm_and_turn(q, k, turns), v.transpose(1, 2)


class Attention(Heads):
    """Bidirectional self-attention with one projection for queries, keys and values.

    Args:
        config: the model.
        proj: has the output layer. Default: True.
    """

    def __init__(self, config: DiTConfig, *, proj: bool = True) -> None:
        super().__init__(config)
        self.qkv = Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_width)
        self.add_output(config, proj=proj)

    def forward(self, x_BTD: Tensor, lengths_B: Tensor | None = None, turns: Turns | None = None) -> Tensor:
        """[B, T, D]; a sample attends to its first ``lengths`` tokens where that is given."""
        qkv = self.qkv(x_BTD)
        if self.heads == self.key_heads and self.qk_norm == "none" and turns is None:
            b, t, _ = x_BTD.shape
            return self.proj(attention_qkv(qkv.view(b, t, 3, self.heads, self.head_width), lengths=lengths_B))
        return self.proj(merged(attention(*self.split(qkv, turns), lengths=lengths_B)))


class CrossAttention(Heads):
    """Attention of the image's tokens to those of the condition."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        self.q = Linear(config.width, config.width)
        self.kv = Linear(config.width, 2 * self.key_heads * self.head_width)
        self.add_output(config)

    def forward(self, x_BTD: Tensor, context_BSD: Tensor, lengths_B: Tensor | None) -> Tensor:
        """[B, T, D]; a sample attends to its first ``lengths`` tokens of the context where that is given."""
        q = self.q(x_BTD).unflatten(2, (self.heads, self.head_width))
        k, v = self.kv(context_BSD).unflatten(2, (2, self.key_heads, self.head_width)).unbind(2)
        return self.proj(merged(attention(*self.norm_and_turn(q, k, None), v.transpose(1, 2), lengths=lengths_B)))


def merged(y_BHTK: Tensor) -> Tensor:
    """The heads of a token side by side: [B, T, H * K]."""
    return y_BHTK.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    """Two linear layers with an activation between: the tanh form of GELU, or SwiGLU.

    Args:
        width, hidden, out: D, F, and the width of the result.
        swiglu: the first layer gives twice F, and SiLU of its first half multiplies the second.
    """

    def __init__(self, width: int, hidden: int, out: int, *, swiglu: bool = False) -> None:
        super().__init__()
        self.swiglu = swiglu
        self.fc1 = Linear(width, hidden * (2 if swiglu else 1))
        self.fc2 = Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        if is_bare(self.fc1):
            return self.fc2(activated(x, self.fc1.weight, self.fc1.bias, self.swiglu))
        return self.fc2(activation(self.fc1(x), self.swiglu))


def activated(x: Tensor, weight: Tensor, bias: Tensor, swiglu: bool) -> Tensor:
    """A linear layer and the activation after it."""
    if not swiglu:
        return bias_gelu(linear(x, weight), bias)
    return activation(linear(x, weight, bias), swiglu)


def activation(x: Tensor, swiglu: bool) -> Tensor:
    """The tanh form of GELU, or SwiGLU, which halves the width."""
    if not swiglu:
        return F.gelu(x, approximate="tanh")
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class Modulation(nn.Module):
    """SiLU and a linear layer, from the condition to ``parts`` vectors of a sample; starts at zero."""

    def __init__(self, width: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        # Named like the released models' nn.Sequential(SiLU, Linear), whose linear layer is number 1.
        self.add_module("1", Linear(width, parts * width))

    @property
    def linear(self) -> nn.Linear:
        """The layer that its name in the released models hides."""
        return self.get_submodule("1")  # type: ignore[return-value]

    def forward(self, c_silu_BD: Tensor) -> tuple[Tensor, ...]:
        return self.linear(c_silu_BD).chunk(self.parts, dim=1)
