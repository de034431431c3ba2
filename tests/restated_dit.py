"""A DiT of any variant, written a second time from the papers: float64, one sample at a time, plain loops and formulas.

Takes a state dict under the package's names and nothing else of the package. A sample's padding is cut off instead of masked,
experts are a loop over tokens, positions and rotations are worked out entry by entry.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Restated:
    """``Restated(state, config)(x, t, y)``: state on the CPU; its tensors may require gradients in float64."""

    def __init__(self, state: dict[str, Tensor], config: Any, routes: dict[int, Tensor] | None = None) -> None:
        self.w = {name: tensor if tensor.dtype == torch.float64 else tensor.double() for name, tensor in state.items()}
        self.c = config
        width = config.image_size if config.image_width is None else config.image_width
        cell = config.latent_factor * config.patch
        self.grid = (config.frames // config.patch_frames, config.image_size // cell, width // cell)
        self.balances: list[Tensor] = []
        # Which image tokens a block works on, by block: [B, tokens]; all where a block is not named.
        self.routes = routes or {}
        self.now: list[int] = []

    # -- small parts

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x: Tensor, name: str | None = None) -> Tensor:
        if self.c.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if name is not None and f"{name}.weight" in self.w:
            x = x * self.w[f"{name}.weight"] + self.w.get(f"{name}.bias", 0.0)
        return x

    def rms(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def activate(self, z: Tensor) -> Tensor:
        if self.c.mlp == "swiglu":
            a, b = z[..., : z.shape[-1] // 2], z[..., z.shape[-1] // 2 :]
            return a * torch.sigmoid(a) * b
        return gelu(z)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.fc2", self.activate(self.linear(f"{name}.fc1", x)))

    def waves(self, t: Tensor) -> Tensor:
        half = self.c.frequency_width // 2
        angles = torch.stack([t.double() * math.exp(-math.log(10_000.0) * k / half) for k in range(half)])
        return torch.cat([angles.cos(), angles.sin()])

    def two_layers(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.mlp.2", F.silu(self.linear(f"{name}.mlp.0", x)))

    def rotated(self, v: Tensor, places: list[tuple[int, ...]]) -> Tensor:
        """[tokens, K] turned; the first so many tokens have places, the others stand still."""
        k = v.shape[-1]
        out = v.clone()
        if not places:
            return out
        axes = len(places[0])
        pairs, extra = divmod(k // 2, axes)
        rows = []
        for place in places:
            angles = []
            for axis, position in enumerate(place):
                n = pairs + (axis >= axes - extra)
                angles += [position * 10_000.0 ** (-i / n) for i in range(n)]
            rows.append(angles)
        angle = torch.tensor(rows, dtype=torch.float64)
        cos, sin = angle.cos(), angle.sin()
        first, second = v[: len(places), : k // 2], v[: len(places), k // 2 :]
        turned = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
        return torch.cat([turned, v[len(places) :]])

    def heads(self, name: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """[tokens, heads * K] each, normalised and cut into heads."""
        width = self.c.width // self.c.heads
        cut = []
        for x, norm in ((q, "q_norm"), (k, "k_norm"), (v, None)):
            weight = self.w.get(f"{name}.{norm}.weight")
            if norm and self.c.qk_norm == "width":
                x = self.rms(x, weight)
            parts = [x[:, i : i + width] for i in range(0, x.shape[1], width)]
            if norm and self.c.qk_norm == "head":
                parts = [self.rms(part, weight) for part in parts]
            cut.append(parts)
        return cut[0], cut[1], cut[2]

    def attend(self, q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> Tensor:
        group = len(q) // len(k)
        out = []
        for i, query in enumerate(q):
            scores = query @ k[i // group].T / math.sqrt(query.shape[1])
            out.append(torch.softmax(scores, -1) @ v[i // group])
        return torch.cat(out, -1)

    def qkv(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        width = self.c.width // self.c.heads
        h, g = self.c.heads * width, (self.c.kv_heads or self.c.heads) * width
        y = self.linear(name, x)
        return y[:, :h], y[:, h : h + g], y[:, h + g :]

    def self_attention(self, name: str, x: Tensor, places: list[tuple[int, ...]]) -> Tensor:
        q, k, v = self.heads(name, *self.qkv(f"{name}.qkv", x))
        if self.c.rope:
            places = [places[i] for i in self.now] if self.now else places
            q, k = [self.rotated(part, places) for part in q], [self.rotated(part, places) for part in k]
        return self.linear(f"{name}.proj", self.attend(q, k, v))

    def cross_attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        both = self.linear(f"{name}.kv", context)
        k, v = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
        return self.linear(f"{name}.proj", self.attend(*self.heads(name, self.linear(f"{name}.q", x), k, v)))

    # -- inputs

    def patches(self, x: Tensor) -> Tensor:
        c, p, pf = self.c, self.c.patch, self.c.patch_frames
        x = x if x.ndim == 4 else x[:, None]
        rows = []
        for f in range(self.grid[0]):
            for i in range(self.grid[1]):
                for j in range(self.grid[2]):
                    tile = x[:, f * pf : f * pf + pf, i * p : i * p + p, j * p : j * p + p]
                    rows.append(tile.reshape(-1))
        weight = self.w["x_embedder.proj.weight"].reshape(c.width, -1)
        return torch.stack(rows).double() @ weight.T + self.w["x_embedder.proj.bias"]

    def places(self) -> list[tuple[int, ...]]:
        frames, rows, columns = self.grid
        every = [(f, i, j) for f in range(frames) for i in range(rows) for j in range(columns)]
        return every if frames > 1 else [place[1:] for place in every]

    def positions(self) -> Tensor:
        d = self.c.width
        table = torch.zeros(math.prod(self.grid), d, dtype=torch.float64)
        for token, place in enumerate(self.places()):
            row, column = place[-2:]
            for k in range(d // 4):
                omega = 10_000.0 ** (-k / (d // 4))
                table[token, k] += math.sin(column * omega)
                table[token, d // 4 + k] += math.cos(column * omega)
                table[token, d // 2 + k] += math.sin(row * omega)
                table[token, 3 * d // 4 + k] += math.cos(row * omega)
            if self.grid[0] > 1:
                for k in range(d // 2):
                    omega = 10_000.0 ** (-k / (d // 2))
                    table[token, k] += math.sin(place[0] * omega)
                    table[token, d // 2 + k] += math.cos(place[0] * omega)
        return table

    def caption_projection(self, x: Tensor) -> Tensor:
        if self.c.caption_layers == 1:
            return self.linear("y_embedder.proj", x)
        return self.linear("y_embedder.y_proj.fc2", gelu(self.linear("y_embedder.y_proj.fc1", x)))

    def pooled_words(self, words: list[int]) -> Tensor:
        table = self.w["y_embedder.embedding_table.weight"]
        rows = [table[word] for word in words if word]
        return torch.stack(rows).mean(0) if rows else torch.zeros(self.c.caption_width, dtype=torch.float64)

    def caption_tokens(self, caption: Tensor) -> Tensor:
        """Without the padding behind the last word; at least one token."""
        present = caption != 0 if self.c.vocabulary_size else (caption != 0).any(-1)
        kept = max([i + 1 for i in range(len(caption)) if present[i]], default=1)
        if not self.c.vocabulary_size:
            return self.caption_projection(caption[:kept].double())
        width, half = self.c.caption_width, self.c.caption_width // 2
        rows = []
        for place, word in enumerate(caption[:kept].tolist()):
            row = torch.zeros(width, dtype=torch.float64)
            for k in range(half):
                row[k], row[half + k] = (
                    math.sin(place * 10_000.0 ** (-k / half)),
                    math.cos(place * 10_000.0 ** (-k / half)),
                )
            rows.append(self.w["y_embedder.embedding_table.weight"][word] + row)
        return self.caption_projection(torch.stack(rows))

    # -- blocks

    def experts(self, name: str, rows: list[Tensor]) -> list[Tensor]:
        """A mixture over the tokens of the whole batch."""
        c = self.c
        probability = [torch.softmax(self.w[f"{name}.router.weight"] @ row, -1) for row in rows]
        best = [p.detach().argsort(descending=True, stable=True)[: c.experts_per_token].tolist() for p in probability]
        room = [10**9] * c.experts
        if c.expert_capacity is not None:
            room = [math.ceil(c.expert_capacity * len(rows) * c.experts_per_token / c.experts)] * c.experts
        out = [torch.zeros_like(row) for row in rows]
        used = [0] * c.experts
        for choice in range(c.experts_per_token):
            for n, row in enumerate(rows):
                e = best[n][choice]
                used[e] += 1
                if room[e] == 0:
                    continue
                room[e] -= 1
                w = {
                    part: self.w[f"{name}.experts.{part}"][e]
                    for part in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
                }
                hidden = self.activate(w["fc1_weight"] @ row + w["fc1_bias"])
                out[n] = out[n] + probability[n][e] * (w["fc2_weight"] @ hidden + w["fc2_bias"])
        if c.shared_experts:
            out = [y + self.mlp(f"{name}.shared", row) for y, row in zip(out, rows, strict=True)]
        mean = torch.stack(probability).mean(0)
        total = len(rows) * c.experts_per_token
        self.balances.append(c.experts * sum(used[e] / total * mean[e] for e in range(c.experts)))
        return out

    def vectors(self, name: str, branches: int, cond: Tensor | None) -> list[tuple[Tensor | float, ...]]:
        """Shift, scale and gate of each branch of a block."""
        kind = self.c.modulation
        if kind == "none":
            return [(0.0, 0.0, 1.0)] * branches
        if kind == "adaln-single":
            parts = (
                self.linear("t_block.1", F.silu(cond)).reshape(3 * branches, -1) + self.w[f"{name}.scale_shift_table"]
            ).unbind(0)
        else:
            parts = self.linear(f"{name}.adaLN_modulation.1", F.silu(cond)).reshape(-1, self.c.width).unbind(0)
        if kind == "adaln":
            return [(parts[2 * i], parts[2 * i + 1], 1.0) for i in range(branches)]
        return [tuple(parts[3 * i : 3 * i + 3]) for i in range(branches)]

    def folded(self, name: str, y: Tensor, along: str) -> Tensor:
        frames, rows, columns = self.grid
        places = self.places()
        if along == "full":
            return self.self_attention(name, y, places)
        y = y.reshape(frames, rows * columns, -1)
        if along == "space":
            inner = [(i, j) for i in range(rows) for j in range(columns)]
            return torch.cat([self.self_attention(name, y[f], inner) for f in range(frames)])
        lines = [self.self_attention(name, y[:, n], [(f,) for f in range(frames)]) for n in range(rows * columns)]
        return torch.stack(lines, 1).reshape(frames * rows * columns, -1)

    def block(self, i: int, xs: list[Tensor], conds: list[Tensor], contexts: list[Tensor | None]) -> list[Tensor]:
        c, name = self.c, f"blocks.{i}"
        along = {"full": ["full"], "space-time": ["space", "time"], "alternating": [("space", "time")[i % 2]]}[
            c.attention
        ]
        before, all_vectors = [], []
        for b, (x, cond, context) in enumerate(zip(xs, conds, contexts, strict=True)):
            self.now = self.routes[i][b].tolist() if i in self.routes else []
            vectors = self.vectors(name, len(along) + 1, cond)
            for n, way in enumerate(along):
                shift, scale, gate = vectors[n]
                y = self.norm(x, f"{name}.{('norm1', 'norm_temporal')[n]}") * (1 + scale) + shift
                x = x + gate * self.folded(f"{name}.{('attn', 'temporal')[n]}", y, way)
            if c.context == "cross-attention":
                y = self.norm(x, f"{name}.cross_norm") if c.cross_norm else x
                x = x + self.cross_attention(f"{name}.cross_attn", y, context)
            before.append(x)
            all_vectors.append(vectors[-1])
        ys = [
            self.norm(x, f"{name}.norm2") * (1 + scale) + shift
            for x, (shift, scale, _) in zip(before, all_vectors, strict=True)
        ]
        if c.experts and i % c.moe_every == 0:
            flat = self.experts(f"{name}.mlp", [row for y in ys for row in y])
            outs = list(torch.stack(flat).split([len(y) for y in ys]))
        else:
            outs = [self.mlp(f"{name}.mlp", y) for y in ys]
        return [x + gate * y for x, y, (_, _, gate) in zip(before, outs, all_vectors, strict=True)]

    def joint(self, x: Tensor, z: Tensor, cond: Tensor) -> Tensor:
        c, silu = self.c, F.silu(cond)
        for i in range(c.depth):
            closed = not c.single_depth and i == c.depth - 1
            heads, rest = [], []
            for name, s, parts in ((f"blocks.{i}", x, 6), (f"blocks.{i}.context", z, 2 if closed and True else 6)):
                vectors = self.linear(f"{name}.adaLN_modulation.1", silu).reshape(parts if "context" in name else 6, -1)
                y = self.norm(s) * (1 + vectors[1]) + vectors[0]
                q, k, v = self.heads(f"{name}.attn", *self.qkv(f"{name}.attn.qkv", y))
                if c.rope and "context" not in name:
                    q, k = ([self.rotated(part, self.places()) for part in parts_] for parts_ in (q, k))
                heads.append((q, k, v))
                rest.append(vectors[2:])
            both = [[torch.cat(pair) for pair in zip(a, b, strict=True)] for a, b in zip(*heads, strict=True)]
            y = self.attend(*both)
            ours, theirs = y[: len(x)], y[len(x) :]
            x = self.after(f"blocks.{i}", x, ours, rest[0])
            if not closed:
                z = self.after(f"blocks.{i}.context", z, theirs, rest[1])
        if not c.single_depth:
            return x
        tokens, s = len(x), torch.cat([x, z])
        for i in range(c.single_depth):
            name = f"blocks.{c.depth + i}"
            shift, scale, gate = self.linear(f"{name}.adaLN_modulation.1", silu).reshape(3, -1)
            y = self.linear(f"{name}.linear1", self.norm(s) * (1 + scale) + shift)
            width = c.width // c.heads
            h, g = c.heads * width, (c.kv_heads or c.heads) * width
            q, k, v = self.heads(name, y[:, :h], y[:, h : h + g], y[:, h + g : h + 2 * g])
            if c.rope:
                q, k = ([self.rotated(part, self.places()) for part in parts_] for parts_ in (q, k))
            out = torch.cat([self.attend(q, k, v), self.activate(y[:, h + 2 * g :])], -1)
            s = s + gate * self.linear(f"{name}.linear2", out)
        return s[:tokens]

    def after(self, name: str, s: Tensor, y: Tensor, vectors: Tensor) -> Tensor:
        gate_a, shift, scale, gate_m = vectors
        s = s + gate_a * self.linear(f"{name}.attn.proj", y)
        return s + gate_m * self.mlp(f"{name}.mlp", self.norm(s) * (1 + scale) + shift)

    # -- all

    def __call__(self, x: Tensor, t: Tensor, y: Any = None, guidance: Tensor | None = None) -> Tensor:
        c, pooled = self.c, None
        if c.pooled_width:
            y, pooled = y
        xs, conds, contexts = [], [], []
        for b in range(len(x)):
            h = self.patches(x[b])
            if c.positions == "sincos":
                h = h + self.positions()
            elif c.positions == "learned":
                h = h + self.w["pos_embed"][0]
            cond, context = self.two_layers("t_embedder", self.waves(t[b])), None
            if c.condition == "class":
                row = self.w["y_embedder.embedding_table.weight"][y[b]]
                if c.context == "pooled":
                    cond = cond + row
                else:
                    context = row[None]
            elif c.condition == "caption":
                if c.context == "pooled":
                    cond = cond + self.caption_projection(self.pooled_words(y[b].tolist()))
                else:
                    context = self.caption_tokens(y[b])
            if c.guidance_embed:
                scale = torch.tensor(1.0) if guidance is None else guidance[b]
                cond = cond + self.two_layers("guidance_embedder", self.waves(1000 * scale))
            if pooled is not None:
                cond = cond + self.two_layers("pooled_embedder", pooled[b].double())
            if c.modulation == "none":
                context = cond[None] if context is None else torch.cat([cond[None], context])
            xs.append(h)
            conds.append(cond)
            contexts.append(context)
        tokens = len(xs[0])
        if c.context == "joint":
            xs = [self.joint(*sample) for sample in zip(xs, contexts, conds, strict=True)]
        else:
            if c.context == "in-context":
                xs = [torch.cat(pair) for pair in zip(xs, contexts, strict=True)]
            for i in range(c.depth):
                if i not in self.routes:
                    xs = self.block(i, xs, conds, contexts)
                    continue
                rows = [[*self.routes[i][b].tolist(), *range(tokens, len(x))] for b, x in enumerate(xs)]
                parts = self.block(i, [x[row] for x, row in zip(xs, rows, strict=True)], conds, contexts)
                for b, (row, part) in enumerate(zip(rows, parts, strict=True)):
                    places = {token: part[n] for n, token in enumerate(row)}
                    xs[b] = torch.stack([places.get(token, xs[b][token]) for token in range(len(xs[b]))])
        return torch.stack([self.image(h[:tokens], cond) for h, cond in zip(xs, conds, strict=True)])

    def image(self, h: Tensor, cond: Tensor) -> Tensor:
        c = self.c
        if c.modulation == "none":
            h = self.norm(h, "final_layer.norm_final")
        else:
            if c.modulation == "adaln-single":
                shift, scale = self.w["final_layer.scale_shift_table"] + cond
            else:
                shift, scale = self.linear("final_layer.adaLN_modulation.1", F.silu(cond)).reshape(2, -1)
            h = self.norm(h) * (1 + scale) + shift
        out = self.linear("final_layer.linear", h)
        p, pf, channels = c.patch, c.patch_frames, c.in_channels * (2 if c.learn_sigma else 1)
        frames, rows, columns = self.grid
        image = torch.zeros(channels, frames * pf, rows * p, columns * p, dtype=torch.float64)
        pieces = iter(out)
        for f in range(frames):
            for i in range(rows):
                for j in range(columns):
                    tile = next(pieces).reshape(pf, p, p, channels).permute(3, 0, 1, 2)
                    image[:, f * pf : f * pf + pf, i * p : i * p + p, j * p : j * p + p] = tile
        return image if c.frames > 1 or pf > 1 else image[:, 0]


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
