"""Every variant of diffusion transformer that the ledger counts, as plain torch modules: the ledger's oracle.

Written from the papers, not from the ledger. Nothing here is fast, trained or numerically careful; what
counts is which operations run on which shapes. Modules are named as the ledger's lines are, numbers of blocks
and experts apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ditscale.dit import DiTConfig


@dataclass
class Inputs:
    """One batch: ``packed`` lays samples of different lengths end to end in one row."""

    image: list[int]  # image tokens of each sample
    caption: list[int]  # caption tokens of each sample
    packed: bool
    frames: int = 1

    @property
    def batch(self) -> int:
        return len(self.image)


def empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


class Linear(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty(fan_out, fan_in))
        self.bias = nn.Parameter(empty(fan_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """Layer norm or RMS norm over the last dimension."""

    def __init__(self, width: int, kind: str, affine: bool) -> None:
        super().__init__()
        self.width, self.kind = width, kind
        self.weight = nn.Parameter(empty(width)) if affine else None
        self.bias = nn.Parameter(empty(width)) if affine and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, (self.width,), self.weight, self.bias, 1e-6)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y if self.weight is None else y * self.weight


class SiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Scores(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)


class Values(nn.Module):
    def forward(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v


class Core(nn.Module):
    """Attention of [B, N, H*K] queries to [B, S, G*K] keys, sample by sample where the batch is packed."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.h, self.g, self.k = config.heads, config.key_heads, config.width // config.heads
        self.scores, self.values = Scores(), Values()
        self.flash = False  # torch's fused operator, whose backward pass forms the scores again

    def one(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, t, s = q.shape[0], q.shape[1], k.shape[1]
        q = (
            q.reshape(n, t, self.h, self.k).transpose(1, 2).reshape(n, self.g, -1, self.k)
        )  # a group's heads side by side
        k, v = (z.reshape(n, s, self.g, self.k).transpose(1, 2) for z in (k, v))
        if self.flash:
            y = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        else:
            y = self.values(self.scores(q, k).softmax(-1), v)
        return y.reshape(n, self.h, t, self.k).transpose(1, 2).reshape(n, t, self.h * self.k)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int] | None, keys: Sequence[int] | None
    ) -> Tensor:
        if queries is None:
            return self.one(q, k, v)
        parts = zip(q.split(list(queries), 1), k.split(list(keys), 1), v.split(list(keys), 1), strict=True)
        return torch.cat([self.one(*part) for part in parts], 1)


class QKNorm(nn.Module):
    def __init__(self, config: DiTConfig, heads: int) -> None:
        super().__init__()
        self.kind, self.k = config.qk_norm, config.width // config.heads
        if self.kind != "none":
            self.norm = Norm(self.k if self.kind == "head" else heads * self.k, "rms", True)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        return self.norm(x.unflatten(-1, (-1, self.k))).flatten(-2) if self.kind == "head" else self.norm(x)


def rotate(x: Tensor, k: int) -> Tensor:
    """Rotary embedding as a complex product, every pair by its own angle."""
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, k // 2, 2)))
    turn = torch.empty(x.shape[1], 1, k // 2, device="meta", dtype=torch.complex64)
    return torch.view_as_real(pairs * turn).flatten(-3)


class Attention(Core):
    """Self-attention within frames ("space"), along time ("time") or over everything ("full")."""

    def __init__(self, config: DiTConfig, along: str = "full") -> None:
        super().__init__(config)
        d = config.width
        self.along, self.rope = along, config.rope
        self.qkv = Linear(d, (self.h + 2 * self.g) * self.k)
        self.q_norm, self.k_norm = QKNorm(config, self.h), QKNorm(config, self.g)
        self.proj = Linear(d, d)

    def forward(self, x: Tensor, lengths: Sequence[int] | None, frames: int) -> Tensor:  # type: ignore[override]
        q, k, v = self.qkv(x).split([self.h * self.k, self.g * self.k, self.g * self.k], -1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, self.k), rotate(k, self.k)
        b, n, _ = x.shape
        if self.along != "full":
            q, k, v = (self.fold(z, frames) for z in (q, k, v))
        y = super().forward(q, k, v, lengths, lengths)
        if self.along == "space":
            y = y.reshape(b, n, -1)
        elif self.along == "time":
            y = y.reshape(b, n // frames, frames, -1).transpose(1, 2).reshape(b, n, -1)
        return self.proj(y)

    def fold(self, z: Tensor, frames: int) -> Tensor:
        b, n, w = z.shape
        z = z.reshape(b, frames, n // frames, w)
        return z.reshape(-1, n // frames, w) if self.along == "space" else z.transpose(1, 2).reshape(-1, frames, w)


class Cross(Core):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        d = config.width
        self.q, self.kv = Linear(d, d), Linear(d, 2 * self.g * self.k)
        self.q_norm, self.k_norm = QKNorm(config, self.h), QKNorm(config, self.g)
        self.proj = Linear(d, d)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, queries: Sequence[int] | None, keys: Sequence[int] | None
    ) -> Tensor:
        k, v = self.kv(context).chunk(2, -1)
        return self.proj(super().forward(self.q_norm(self.q(x)), self.k_norm(k), v, queries, keys))


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig, hidden: int | None = None) -> None:
        super().__init__()
        f = config.mlp_width if hidden is None else hidden
        self.swiglu = config.mlp == "swiglu"
        self.fc1, self.fc2 = Linear(config.width, f * (1 + self.swiglu)), Linear(f, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activate(self.fc1(x), self.swiglu))


def activate(x: Tensor, swiglu: bool) -> Tensor:
    if not swiglu:
        return F.gelu(x, approximate="tanh")
    a, b = x.chunk(2, -1)
    return F.silu(a) * b


class Mixture(nn.Module):
    """Top-k experts; ``capacity`` rows each where given, else as many as the router sends (here: uneven
    shares).
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.k, self.capacity = config.experts_per_token, config.expert_capacity
        self.router = Linear(config.width, config.experts, bias=False)
        self.experts = nn.ModuleList(Mlp(config) for _ in range(config.experts))
        self.shared = Mlp(config, config.shared_experts * config.mlp_width) if config.shared_experts else None

    def forward(self, x: Tensor) -> Tensor:
        shape, d = x.shape, x.shape[-1]
        x = x.reshape(-1, d)
        rows, experts = x.shape[0], len(self.experts)
        gates, _ = self.router(x).softmax(-1).topk(self.k, -1)
        if self.capacity is None:
            sent = rows * self.k
            shares = [sent // (i + 2) for i in range(experts - 1)]
            while sum(shares) > sent:
                shares[shares.index(max(shares))] -= 1
            shares.append(sent - sum(shares))
        else:
            each = -int(-(self.capacity * rows * self.k / experts) // 1)
            shares = [each] * experts
            sent = each * experts
        where = torch.empty(sent, device="meta", dtype=torch.int64)
        gate = gates.flatten().index_select(0, where)
        parts = x.index_select(0, where).split(shares, 0)
        y = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        y = torch.zeros_like(x).index_add(0, where, y * gate[:, None])
        if self.shared is not None:
            y = y + self.shared(x)
        return y.reshape(shape)


class Block(nn.Module):
    """One stream: attention (once or twice), cross-attention, feed-forward."""

    def __init__(self, config: DiTConfig, index: int) -> None:
        super().__init__()
        d = config.width
        self.kind, self.gated = config.modulation, config.modulation in ("adaln-zero", "adaln-single")
        self.per_branch = 3 if self.gated else 2
        along = config.attention
        if along == "alternating":
            along = "time" if index % 2 else "space"
        branches = ["attn", "temporal", "mlp"] if along == "space-time" else ["attn", "mlp"]
        self.attn = Attention(config, "space" if along == "space-time" else along)
        if along == "space-time":
            self.temporal = Attention(config, "time")
        if config.context == "cross-attention":
            self.cross = Cross(config)
            self.cross_norm = Norm(d, config.norm, True) if config.cross_norm else None
        if config.experts and index % config.moe_every == 0:
            self.moe: Mixture | None = Mixture(config)
        else:
            self.moe, self.mlp = None, Mlp(config)
        self.norms = nn.ModuleDict({name: Norm(d, config.norm, self.kind == "none") for name in branches})
        if self.kind in ("adaln-zero", "adaln"):
            self.modulation = Linear(d, len(branches) * self.per_branch * d)
        elif self.kind == "adaln-single":
            self.table = nn.Parameter(empty(len(branches) * 3, d))

    def forward(
        self, x: Tensor, c: Tensor | None, context: Tensor | None, run: Run, lengths: Sequence[int] | None
    ) -> Tensor:
        vectors = None
        if self.kind in ("adaln-zero", "adaln"):
            vectors = run.rows(self.modulation(c), lengths).chunk(len(self.norms) * self.per_branch, -1)
        elif self.kind == "adaln-single":
            both = (self.table + c.unflatten(-1, self.table.shape)).flatten(1)
            vectors = run.rows(both, lengths).chunk(len(self.table), -1)
        for i, name in enumerate(self.norms):
            y = self.norms[name](x)
            if vectors is not None:
                shift, scale = vectors[self.per_branch * i : self.per_branch * i + 2]
                y = y * (1 + scale) + shift
            if name == "mlp":
                y = self.mlp(y) if self.moe is None else self.moe(y)
            else:
                y = getattr(self, name)(y, lengths, run.inputs.frames)
            x = x + (vectors[self.per_branch * i + 2] * y if self.gated else y)
            last_attention = list(self.norms)[-2]
            if name == last_attention and hasattr(self, "cross"):
                y = x if self.cross_norm is None else self.cross_norm(x)
                x = x + self.cross(y, context, lengths, run.keys)
                context = None
        return x


class Run:
    """What a forward pass carries along: how tokens belong to samples."""

    def __init__(self, inputs: Inputs, context: list[int]) -> None:
        self.inputs = inputs
        self.keys = context if inputs.packed else None

    def rows(self, vectors: Tensor, lengths: Sequence[int] | None) -> Tensor:
        """[B, X] to what broadcasts against the tokens."""
        if not self.inputs.packed:
            return vectors[:, None]
        which = torch.empty(sum(lengths), device="meta", dtype=torch.int64)
        return vectors.index_select(0, which)[None]


class Stream(nn.Module):
    """One stream of a joint block; a ``closed`` one ends at its keys and values."""

    def __init__(self, config: DiTConfig, closed: bool) -> None:
        super().__init__()
        d, self.h, self.g, self.k = config.width, config.heads, config.key_heads, config.width // config.heads
        self.modulation = Linear(d, (2 if closed else 6) * d)
        self.norm1 = Norm(d, config.norm, False)
        self.attn = nn.Module()
        self.attn.qkv = Linear(d, (self.h + 2 * self.g) * self.k)
        self.attn.q_norm, self.attn.k_norm = QKNorm(config, self.h), QKNorm(config, self.g)
        self.closed = closed
        if not closed:
            self.attn.proj = Linear(d, d)
            self.norm2 = Norm(d, config.norm, False)
            self.mlp = Mlp(config)

    def before(self, x: Tensor, c: Tensor, run: Run, lengths: Sequence[int]) -> tuple[Tensor, ...]:
        self.vectors = run.rows(self.modulation(c), lengths).chunk(2 if self.closed else 6, -1)
        y = self.norm1(x) * (1 + self.vectors[1]) + self.vectors[0]
        q, k, v = self.attn.qkv(y).split([self.h * self.k, self.g * self.k, self.g * self.k], -1)
        return self.attn.q_norm(q), self.attn.k_norm(k), v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        _, _, gate1, shift, scale, gate2 = self.vectors
        x = x + gate1 * self.attn.proj(y)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale) + shift)


class Joint(Stream):
    """MMDiT's double-stream block: the image's own stream, and the caption's as a child."""

    def __init__(self, config: DiTConfig, closed: bool) -> None:
        super().__init__(config, closed=False)
        self.context = Stream(config, closed)
        self.core = Core(config)
        self.attn.scores, self.attn.values = self.core.scores, self.core.values
        self.rope = config.rope

    def forward(self, x: Tensor, z: Tensor, c: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        image, caption = run.inputs.image, run.inputs.caption
        ours, theirs = self.before(x, c, run, image), self.context.before(z, c, run, caption)
        q, k, v = (interleave(a, b, run) for a, b in zip(theirs, ours, strict=True))
        if self.rope:
            q, k = rotate(q, self.k), rotate(k, self.k)
        both = [a + b for a, b in zip(image, caption, strict=True)] if run.inputs.packed else None
        y_z, y_x = part(self.core(q, k, v, both, both), run)
        x = self.after(x, y_x)
        return x, z if self.context.closed else self.context.after(z, y_z)


class Single(nn.Module):
    """Flux's single-stream block: attention and feed-forward side by side."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, f = config.width, config.mlp_width
        core = Core(config)
        self.scores, self.values = core.scores, core.values
        self.core = core
        h, g, self.k = config.heads, config.key_heads, config.width // config.heads
        self.swiglu, self.rope = config.mlp == "swiglu", config.rope
        self.sizes = [h * self.k, g * self.k, g * self.k, f * (1 + self.swiglu)]
        self.modulation, self.norm = Linear(d, 3 * d), Norm(d, config.norm, False)
        self.linear1, self.linear2 = Linear(d, sum(self.sizes)), Linear(d + f, d)
        self.q_norm, self.k_norm = QKNorm(config, h), QKNorm(config, g)

    def forward(self, x: Tensor, c: Tensor, run: Run, lengths: Sequence[int] | None) -> Tensor:
        shift, scale, gate = run.rows(self.modulation(c), lengths).chunk(3, -1)
        q, k, v, hidden = self.linear1(self.norm(x) * (1 + scale) + shift).split(self.sizes, -1)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, self.k), rotate(k, self.k)
        y = self.core(q, k, v, lengths, lengths)
        return x + gate * self.linear2(torch.cat([y, activate(hidden, self.swiglu)], -1))


def interleave(first: Tensor, second: Tensor, run: Run) -> Tensor:
    """Caption before image, in each sample."""
    if not run.inputs.packed:
        return torch.cat([first, second], 1)
    pieces = zip(first.split(run.inputs.caption, 1), second.split(run.inputs.image, 1), strict=True)
    return torch.cat([piece for pair in pieces for piece in pair], 1)


def part(y: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`interleave`."""
    if not run.inputs.packed:
        first, second = y.split([run.inputs.caption[0], run.inputs.image[0]], 1)
        return first, second
    sizes = [n for pair in zip(run.inputs.caption, run.inputs.image, strict=True) for n in pair]
    pieces = y.split(sizes, 1)
    return torch.cat(pieces[0::2], 1), torch.cat(pieces[1::2], 1)


class Final(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, self.kind = config.width, config.modulation
        self.norm = Norm(d, config.norm, self.kind == "none")
        if self.kind in ("adaln-zero", "adaln"):
            self.modulation = Linear(d, 2 * d)
        elif self.kind == "adaln-single":
            self.table = nn.Parameter(empty(2, d))
        self.linear = Linear(d, config.patch_frames * config.patch**2 * config.out_channels)

    def forward(self, x: Tensor, c: Tensor | None, silu: Tensor | None, run: Run) -> Tensor:
        y = self.norm(x)
        vectors = None
        if self.kind in ("adaln-zero", "adaln"):
            vectors = self.modulation(silu)
        elif self.kind == "adaln-single":
            vectors = (self.table + c[:, None]).flatten(1)
        if vectors is not None:
            shift, scale = run.rows(vectors, run.inputs.image).chunk(2, -1)
            y = y * (1 + scale) + shift
        return self.linear(y)


class Variant(nn.Module):
    """A diffusion transformer of any configuration, on the meta device."""

    def __init__(self, config: DiTConfig, *, convolution: bool = False, repeat_blocks: bool = False) -> None:
        super().__init__()
        d = config.width
        self.config, self.repeat_blocks = config, repeat_blocks
        if convolution:
            size = (config.patch_frames, config.patch, config.patch)
            self.patch_embed: nn.Module = nn.Conv3d(config.in_channels, d, size, size, device="meta")
        else:
            self.patch_embed = Linear(config.patch_width, d)
        self.convolution = convolution
        if config.positions == "learned":
            self.positions = nn.Parameter(empty(config.tokens, d))
        self.time_mlp = nn.Sequential(Linear(config.frequency_width, d), SiLU(), Linear(d, d))
        if config.guidance_embed:
            self.guidance = nn.Sequential(Linear(config.frequency_width, d), SiLU(), Linear(d, d))
        if config.pooled_width:
            self.pooled = nn.Sequential(Linear(config.pooled_width, d), SiLU(), Linear(d, d))
        if config.condition == "class":
            self.label = nn.Parameter(empty(config.num_classes + 1, d))
        if config.condition == "caption":
            self.caption = nn.Module()
            if config.vocabulary_size:
                self.caption.words = nn.Parameter(empty(config.vocabulary_size, config.caption_width))
            if config.caption_layers == 1:
                self.caption.proj = Linear(config.caption_width, d)
            else:
                self.caption.fc1, self.caption.fc2 = Linear(config.caption_width, d), Linear(d, d)
        if config.modulation == "adaln-single":
            branches = 3 if config.attention == "space-time" else 2
            self.modulation = Linear(d, 3 * branches * d)
        if config.context == "joint":
            closed = [not config.single_depth and i == config.depth - 1 for i in range(config.depth)]
            self.blocks = nn.ModuleList(Joint(config, last) for last in closed)
            self.single = nn.ModuleList(Single(config) for _ in range(config.single_depth))
        else:
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.depth))
        self.final = Final(config)

    def forward(self, inputs: Inputs) -> Tensor:
        config, b = self.config, inputs.batch
        x = self.embed_patches(inputs)
        c = self.time_mlp(waves(b, config.frequency_width))
        time = c
        if config.guidance_embed:
            c = c + self.guidance(waves(b, config.frequency_width))
        if config.pooled_width:
            c = c + self.pooled(empty(b, config.pooled_width))
        tokens = self.condition(inputs)
        if config.context == "pooled" and tokens is not None:
            c = c + tokens
        context, sizes = tokens, list(inputs.caption)
        if config.modulation == "none":  # the time is a token, after the others
            sizes = [n + 1 for n in sizes] if tokens is not None else [1] * b
            context = append(tokens, time, inputs)
        run = Run(inputs, sizes)
        silu = None if config.modulation == "none" else F.silu(c)
        if config.context == "joint":
            x = self.joint(x, tokens, silu, run)
        else:
            modulation = self.modulation(silu) if config.modulation == "adaln-single" else silu
            x = self.one_stream(x, modulation, context, run, sizes)
        return self.final(x, c, silu, run)

    def embed_patches(self, inputs: Inputs) -> Tensor:
        config = self.config
        if inputs.packed:
            x = self.patch_embed(empty(1, sum(inputs.image), config.patch_width))
        elif self.convolution:
            tokens = inputs.image[0] // inputs.frames
            shape = (inputs.frames * config.patch_frames, config.patch, tokens * config.patch)
            x = self.patch_embed(empty(inputs.batch, config.in_channels, *shape)).flatten(2).transpose(1, 2)
        else:
            x = self.patch_embed(empty(inputs.batch, inputs.image[0], config.patch_width))
        if config.positions == "sincos":
            return x + empty(x.shape[1], x.shape[2])
        if config.positions == "none":
            return x
        if inputs.packed:
            return x + self.positions.index_select(0, index(x.shape[1]))[None]
        return x + self.positions[None]

    def condition(self, inputs: Inputs) -> Tensor | None:
        """Tokens of the condition, [B, S, D] or [1, all, D]; [B, D] where it is pooled."""
        config, b = self.config, inputs.batch
        if config.condition == "none":
            return None
        if config.condition == "class":
            rows = F.embedding(torch.empty(b, device="meta", dtype=torch.int64), self.label)
            if config.context == "pooled":
                return rows
            return rows[None] if inputs.packed else rows[:, None]
        if config.context == "pooled":
            words = torch.empty(b, config.caption_tokens, device="meta", dtype=torch.int64)
            present = (words != 0)[..., None].to(torch.float32)
            total = (F.embedding(words, self.caption.words) * present).sum(1)
            features = total / present.sum(1).clamp(min=1)
        else:
            shape = (1, sum(inputs.caption)) if inputs.packed else (b, inputs.caption[0])
            features = empty(*shape, config.caption_width)
            if config.vocabulary_size:
                features = F.embedding(torch.empty(shape, device="meta", dtype=torch.int64), self.caption.words)
        if config.caption_layers == 1:
            return self.caption.proj(features)
        return self.caption.fc2(F.gelu(self.caption.fc1(features), approximate="tanh"))

    def one_stream(self, x: Tensor, c: Tensor | None, context: Tensor | None, run: Run, sizes: list[int]) -> Tensor:
        config, inputs = self.config, run.inputs
        joined = config.context == "in-context"
        lengths = [a + b for a, b in zip(inputs.image, sizes, strict=True)] if joined else list(inputs.image)
        if joined:
            x = merge(x, context, inputs, sizes)
        whole, share = x, 1.0
        for i, block in enumerate(self.blocks):
            wanted = config.token_keep[i] if config.token_keep else 1.0
            if wanted != share:
                if share < 1:
                    whole = whole.index_copy(1, index(x.shape[1]), x)
                x, share = whole, wanted
                if share < 1:
                    x = whole.index_select(1, index(self.kept_rows(lengths, inputs, share)))
            now = self.kept_lengths(lengths, inputs, share) if inputs.packed else None
            other = context if config.context == "cross-attention" else None
            x = self.call(block, x, c, other, run, now)
            if share == 1:
                whole = x
        if share < 1:
            x = whole.index_copy(1, index(x.shape[1]), x)
        return split_image(x, inputs, sizes) if joined else x

    def kept_lengths(self, lengths: list[int], inputs: Inputs, share: float) -> list[int]:
        if share == 1:
            return lengths
        return [max(1, int(share * t)) + (n - t) for n, t in zip(lengths, inputs.image, strict=True)]

    def kept_rows(self, lengths: list[int], inputs: Inputs, share: float) -> int:
        rows = self.kept_lengths(lengths, inputs, share)
        return sum(rows) if inputs.packed else rows[0]

    def joint(self, x: Tensor, z: Tensor, c: Tensor, run: Run) -> Tensor:
        for block in self.blocks:
            x, z = self.call(block, x, z, c, run)
        if not len(self.single):
            return x
        x = interleave(z, x, run)
        inputs = run.inputs
        lengths = [a + b for a, b in zip(inputs.image, inputs.caption, strict=True)] if inputs.packed else None
        for block in self.single:
            x = self.call(block, x, c, run, lengths)
        return part(x, run)[1]

    def call(self, block: nn.Module, *args: object) -> Tensor:
        return checkpoint(block, *args, use_reentrant=False) if self.repeat_blocks else block(*args)


def index(rows: int) -> Tensor:
    return torch.empty(rows, device="meta", dtype=torch.int64)


def waves(batch: int, width: int) -> Tensor:
    angles = empty(batch)[:, None] * empty(width // 2)
    return torch.cat([angles.cos(), angles.sin()], -1)


def append(tokens: Tensor | None, time: Tensor, inputs: Inputs) -> Tensor:
    """The time's token after each sample's others."""
    if not inputs.packed:
        return time[:, None] if tokens is None else torch.cat([tokens, time[:, None]], 1)
    times = time[None].split(1, 1)
    if tokens is None:
        return torch.cat(times, 1)
    pieces = zip(tokens.split(inputs.caption, 1), times, strict=True)
    return torch.cat([piece for pair in pieces for piece in pair], 1)


def merge(x: Tensor, context: Tensor, inputs: Inputs, sizes: list[int]) -> Tensor:
    if not inputs.packed:
        return torch.cat([x, context], 1)
    pieces = zip(x.split(inputs.image, 1), context.split(sizes, 1), strict=True)
    return torch.cat([piece for pair in pieces for piece in pair], 1)


def split_image(x: Tensor, inputs: Inputs, sizes: list[int]) -> Tensor:
    if not inputs.packed:
        return x[:, : inputs.image[0]]
    pieces = x.split([n for pair in zip(inputs.image, sizes, strict=True) for n in pair], 1)
    return torch.cat(pieces[0::2], 1)
