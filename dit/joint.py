"""MMDiT's blocks: two streams that attend together (arXiv:2403.03206), and Flux's blocks of one stream behind them.

Shape suffixes as in layers.py. The image's tokens stand before the caption's, whose padding is therefore last.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ditscale.dit.block import Around
from ditscale.dit.config import DiTConfig
from ditscale.dit.layers import (
    Attention,
    Heads,
    Linear,
    Mlp,
    Modulation,
    Norm,
    Pending,
    Turns,
    activated,
    activation,
    is_bare,
    merged,
)
from ditscale.kernels import attention, linear


class Stream(nn.Module):
    """One stream's own layers. A ``closed`` one ends at its keys and values: nobody reads what would follow."""

    def __init__(self, config: DiTConfig, *, closed: bool = False) -> None:
        super().__init__()
        d = config.width
        self.closed = closed
        self.attn, self.norm1 = Attention(config, proj=not closed), Norm(d, config.norm, affine=False)
        if not closed:
            self.mlp = Mlp(d, config.mlp_width, d, swiglu=config.mlp == "swiglu")
            self.norm2 = Norm(d, config.norm, affine=False)
        self.adaLN_modulation = Modulation(d, 2 if closed else 6)

    def before(
        self, x_BTD: Tensor, pending: Pending | None, c_silu_BD: Tensor, turns: Turns | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        """The stream; its queries, keys and values; the vectors of what follows the attention."""
        shift, scale, *rest = self.adaLN_modulation(c_silu_BD)
        x_BTD, y_BTD = self.norm1(x_BTD, pending, shift, scale)
        return x_BTD, self.attn.split(self.attn.qkv(y_BTD), turns), rest

    def after(self, x_BTD: Tensor, y_BTD: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Pending]:
        """The stream and the branch that is still to be added, from what the attention gave its tokens."""
        gate_a, shift, scale, gate_m = vectors
        x_BTD, y_BTD = self.norm2(x_BTD, Pending(self.attn.proj(y_BTD), gate_a), shift, scale)
        return x_BTD, Pending(self.mlp(y_BTD), gate_m)


class JointBlock(Stream):
    """MMDiT's block: the image's stream, with the caption's as a child.

    Args:
        config: the model.
        closed: it is the last block that sees the caption. Default: False.
    """

    def __init__(self, config: DiTConfig, *, closed: bool = False) -> None:
        super().__init__(config)
        self.context = Stream(config, closed=closed)

    def forward(
        self,
        x_BTD: Tensor,
        x_pending: Pending | None,
        z_BSD: Tensor,
        z_pending: Pending | None,
        c_silu_BD: Tensor,
        around: Around,
    ) -> tuple[Tensor, Pending, Tensor, Pending | None]:
        """Both streams, each with the branch that is still to be added to it."""
        x_BTD, ours, x_vectors = self.before(x_BTD, x_pending, c_silu_BD, around.turns)
        z_BSD, theirs, z_vectors = self.context.before(z_BSD, z_pending, c_silu_BD, None)
        both = (torch.cat(pair, dim=2) for pair in zip(ours, theirs, strict=True))
        y = merged(attention(*both, lengths=around.lengths))
        x_BTD, x_pending = self.after(x_BTD, y[:, : x_BTD.shape[1]], x_vectors)
        if not self.context.closed:
            z_BSD, z_pending = self.context.after(z_BSD, y[:, x_BTD.shape[1] :], z_vectors)
        return x_BTD, x_pending, z_BSD, z_pending


class SingleBlock(Heads):
    """Flux's block: image and caption in one stream, attention and feed-forward side by side on the same norm."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        d, f = config.width, config.mlp_width
        self.swiglu = config.mlp == "swiglu"
        self.heads_width = (self.heads + 2 * self.key_heads) * self.head_width
        self.hidden_width = f * (2 if self.swiglu else 1)
        self.linear1 = Linear(d, self.heads_width + self.hidden_width)
        self.linear2 = Linear(d + f, d)
        self.norm1 = Norm(d, config.norm, affine=False)
        self.add_output(config, proj=False)
        self.adaLN_modulation = Modulation(d, 3)

    def forward(
        self, x_BTD: Tensor, pending: Pending | None, c_silu_BD: Tensor, around: Around
    ) -> tuple[Tensor, Pending]:
        """The stream and the branch that is still to be added."""
        shift, scale, gate = self.adaLN_modulation(c_silu_BD)
        x_BTD, y_BTD = self.norm1(x_BTD, pending, shift, scale)
        sizes = [self.heads_width, self.hidden_width]
        if is_bare(self.linear1):
            # One layer in two products, so that each part's bias can go where it is added for free.
            heads_weight, hidden_weight = self.linear1.weight.split(sizes)
            heads_bias, hidden_bias = self.linear1.bias.split(sizes)
            qkv = linear(y_BTD, heads_weight, heads_bias)
            hidden = activated(y_BTD, hidden_weight, hidden_bias, self.swiglu)
        else:
            qkv, hidden = self.linear1(y_BTD).split(sizes, dim=-1)
            hidden = activation(hidden, self.swiglu)
        q, k, v = self.split(qkv, around.turns)
        y_BTD = merged(attention(q, k, v, lengths=around.lengths))
        return x_BTD, Pending(self.linear2(torch.cat([y_BTD, hidden], dim=-1)), gate)
