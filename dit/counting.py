"""The walk through a model that writes its ledger: every formula of ``docs/flops.md``, as integers. No torch.

Letters: B samples, T image tokens of a sample, S tokens of its condition, N tokens of a sequence, D width, H heads, K head
width, G key heads, F feed-forward width, P patch, C channels, L blocks, E experts. What a formula says is the forward
count; the backward count follows from it (twice, or once where no gradient of the input is needed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditscale.dit import elementwise as ew
from ditscale.dit.config import DiTConfig
from ditscale.dit.ledger import LedgerLine, ParamCount
from ditscale.errors import InputError
from ditscale.kernels.adaln import cost as adaln_cost
from ditscale.kernels.attn import cost as attention_cost
from ditscale.kernels.gelu import cost as gelu_cost
from ditscale.kernels.rotary import cost as rotary_cost

Tokens = tuple[int, int, int]  # samples, image tokens of each, tokens of each one's condition
Pairs = list[tuple[int, int, int]]  # sequences, queries of each, keys of each


@dataclass(frozen=True)
class Workload:
    """What the model is run on.

    Attributes:
        groups: samples that have equal numbers of tokens, as (samples, image tokens, caption tokens).
        frames: patches along time; the image tokens are ``frames`` times those of a frame.
        packed: samples of different lengths stand in one sequence, so modulation is gathered for every token.
    """

    groups: tuple[Tokens, ...]
    frames: int = 1
    packed: bool = False

    @property
    def batch(self) -> int:
        """Samples."""
        return sum(n for n, _, _ in self.groups)


class Walk:
    """Walks through one configuration; ``lines`` and ``params`` hold the result.

    Args:
        config: the model.
        work: what it is run on.
        elementwise: write the lines of elementwise work too (convention ``all``).
        fused: count the operators of ``ditscale.kernels`` as those do; otherwise as the plain operations they replace.
        size: bytes of an element.
    """

    def __init__(
        self, config: DiTConfig, work: Workload, *, elementwise: bool = False, fused: bool = True, size: int = 2
    ) -> None:
        self.config = config
        self.work = work
        self.elementwise = elementwise
        self.fused = fused
        self.size = size
        self.batch = work.batch
        self._lines: dict[str, list[int]] = {}
        self._labels: dict[str, tuple[str, str]] = {}
        self._unrepeated: dict[str, int] = {}
        self._params = {"token": 0, "context": 0, "sample": 0, "embedding": 0}
        self._idle = self._body = self._last_residual = 0
        self._qkv_formula = "2·L·B·T·D·3D" if config.kv_heads is None else "2·L·B·T·D·(H+2G)K"
        # The time (and the class, where it is one) joins the tokens of the condition.
        self.time_token = config.modulation == "none"
        self._modulated_uses = 0
        self.norm_elements = 0
        self._inputs()
        if config.context == "joint":
            self._joint_blocks()
        else:
            self._blocks()
        self._final()
        if elementwise:
            self._fan_out()

    # -- writing -----------------------------------------------------------------------------------------------------

    def _add(
        self, name: str, operation: str, formula: str, forward: int, backward: int, read: int = 0, written: int = 0
    ) -> None:
        line = self._lines.get(name)
        if line is None:
            self._lines[name] = [forward, backward, read, written]
            self._labels[name] = (operation, formula)
        else:
            line[0] += forward
            line[1] += backward
            line[2] += read
            line[3] += written

    def _light(self, name: str, operation: str, formula: str, cost: tuple[int, int], numbers: int = 0) -> None:
        """Elementwise work; ``numbers`` that move each way, 0 where it rides on a neighbour's traffic."""
        if self.elementwise:
            self._add(name, operation, formula, *cost, numbers * self.size, numbers * self.size)

    def _linear(
        self,
        name: str,
        times: int,
        rows: int,
        fan_in: int,
        fan_out: int,
        formula: str,
        who: str,
        *,
        input_grad: bool = True,
        bias: bool = True,
        bias_counted: bool = True,
        copies: int = 1,
    ) -> None:
        """``times`` layers of ``rows`` each; ``copies`` weights in each layer (experts) share the rows."""
        weights = copies * fan_in * fan_out
        forward = 2 * times * rows * fan_in * fan_out
        moved = times * (rows * (fan_in + fan_out) + weights + copies * fan_out * bias) * self.size
        backward_moved = moved + (times * (rows * (fan_in + fan_out) + weights) * self.size if input_grad else 0)
        self._add(name, "matmul", formula, forward, forward * (1 + input_grad), moved, backward_moved)
        self._params[who] += times * (weights + copies * fan_out * bias)
        if self.elementwise and bias and bias_counted:
            outputs = times * rows * fan_out
            self._add(f"{name.rpartition('.')[0] or name}.bias", "elementwise", "1 an output", outputs, outputs)

    def lines(self, recompute: str | Sequence[str], *, score_recompute: bool) -> tuple[LedgerLine, ...]:
        """The ledger, with the column of repeated work filled in.

        Args:
            recompute: "none", "block", "attention", or names of lines.
            score_recompute: the attention kernel's backward pass forms the scores again.
        """
        chosen = self._recomputed(recompute)
        out = []
        for name, (forward, backward, read, written) in self._lines.items():
            again = forward if name in chosen else 0
            if recompute == "block":
                again -= self._unrepeated.get(name, 0)
            if score_recompute and name.endswith(".scores"):
                again += forward
            out.append(LedgerLine(name, *self._labels[name], forward, backward, again, read, written))
        return tuple(out)

    def _recomputed(self, recompute: str | Sequence[str]) -> set[str]:
        if recompute == "none":
            return set()
        if recompute == "block":
            return {name for name in self._lines if name.startswith(("blocks.", "single."))}
        if recompute == "attention":
            return {name for name in self._lines if name.endswith((".scores", ".values", ".softmax"))}
        if isinstance(recompute, str):
            raise InputError(f"recompute: expected none, block, attention or names of lines, got {recompute!r}")
        for name in recompute:
            if name not in self._lines:
                raise InputError(f"recompute: expected names of lines, got {name!r}")
        return set(recompute)

    @property
    def params(self) -> ParamCount:
        """Parameters by how often they work."""
        by = self._params
        total = sum(by.values())
        return ParamCount(
            total, by["token"], by["sample"], by["embedding"], by["context"], total - self._idle, self._body
        )

    # -- token counts ------------------------------------------------------------------------------------------------

    def _rows(self, groups: Sequence[Tokens], length: Callable[[int, int], int]) -> int:
        return sum(n * length(t, s) for n, t, s in groups)

    def _context(self, s: int) -> int:
        return s + self.time_token

    def _sequences(self, share: float) -> list[tuple[int, int]]:
        """(samples, tokens) of the block's own sequence where ``share`` of the image's tokens are kept."""
        joined = self.config.context == "in-context"
        return [(n, kept(t, share) + (self._context(s) if joined else 0)) for n, t, s in self.work.groups]

    # -- inputs ------------------------------------------------------------------------------------------------------

    def _inputs(self) -> None:
        c, b, d, half = self.config, self.batch, self.config.width, self.config.frequency_width // 2
        rows = self._rows(self.work.groups, lambda t, s: t)
        self._linear("patch_embed", 1, rows, c.patch_width, d, "2·B·T·P²C·D", "token", input_grad=False)
        if c.positions != "none":
            # A learned table is shared by the batch; one sample needs no sum over it, a packed one is gathered.
            learned = c.positions == "learned" and (b > 1 or self.work.packed)
            self._light("positions", "elementwise", "B·T·D", (rows * d, rows * d if learned else 0))
        if c.positions == "learned":
            self._params["embedding"] += c.tokens * d

        def scalar_embedding(name: str, fan_in: int, first: str) -> None:
            if name != "pooled":
                self._light(f"{name}.features", "embedding", "angle, sine, cosine", (3 * b * half, 0))
            self._linear(f"{name}.0", 1, b, fan_in, d, first, "sample", input_grad=False)
            self._light(f"{name}.silu", "activation", "4·B·D", ew.silu(b * d))
            self._linear(f"{name}.2", 1, b, d, d, "2·B·D²", "sample")

        scalar_embedding("time_mlp", c.frequency_width, "2·B·frequencies·D")
        added = 0
        if c.guidance_embed:
            scalar_embedding("guidance", c.frequency_width, "2·B·frequencies·D")
            added += 1
        if c.pooled_width:
            scalar_embedding("pooled", c.pooled_width, "2·B·pooled_width·D")
            added += 1
        if c.condition == "class":
            self._params["embedding"] += (c.num_classes + 1) * d
            self._light("label", "embedding", "a row each", (0, b * d))
            added += c.context == "pooled"
        elif c.condition == "caption":
            added += c.context == "pooled"
            self._caption()
        if added:
            self._light("condition.sum", "elementwise", "B·D each", (added * b * d, 0))

    def _caption(self) -> None:
        c, b, d, w = self.config, self.batch, self.config.width, self.config.caption_width
        words = self._rows(self.work.groups, lambda t, s: s) if c.context != "pooled" else b * c.caption_tokens
        learned = c.vocabulary_size > 0
        if learned:
            self._params["embedding"] += c.vocabulary_size * w
            self._light("caption.words", "embedding", "a row each", (0, words * w))
        pooled = c.context == "pooled"
        rows, who = (b, "sample") if pooled else (words, "context")
        if pooled and self.elementwise:
            if not c.caption_tokens:
                raise InputError("caption_tokens: expected the words of a caption for the convention all, got 0")
            # Which words are padding, the mean over the others.
            self._light(
                "caption.mean", "embedding", "2·B·S·W", (2 * words * w + 2 * words + b + b * w, words * w + b * w)
            )
        if c.caption_layers == 1:
            formula = "2·B·caption_width·D" if pooled else "2·B·S·caption_width·D"
            self._linear("caption.proj", 1, rows, w, d, formula, who, input_grad=learned)
            return
        self._linear("caption.fc1", 1, rows, w, d, "2·B·S·caption_width·D", who, input_grad=learned)
        self._light("caption.gelu", "activation", "8·B·S·D", ew.gelu(rows * d))
        self._linear("caption.fc2", 1, rows, d, d, "2·B·S·D²", who)

    # -- blocks with one stream --------------------------------------------------------------------------------------

    def _blocks(self) -> None:
        c = self.config
        kinds: dict[tuple[float, bool, str], int] = {}
        for i in range(c.depth if c.token_keep or c.experts or c.attention == "alternating" else 1):
            along = c.attention if c.attention != "alternating" else ("time" if i % 2 else "space")
            kind = (c.token_keep[i] if c.token_keep else 1.0, bool(c.experts) and i % c.moe_every == 0, along)
            kinds[kind] = kinds.get(kind, 0) + 1
        if len(kinds) == 1:
            kinds = dict.fromkeys(kinds, c.depth)
        self._modulation()
        for (share, mixture, along), times in kinds.items():
            self._block(times, share, mixture, along)
        if c.context == "cross-attention" and self.elementwise:
            shared = (c.depth - 1) * self._rows(self.work.groups, lambda t, s: self._context(s)) * c.width
            self._light("blocks.cross.fan_out", "elementwise", "gradients of S tokens meet", (0, shared))
        if self.elementwise and any(share < 1 for share in c.token_keep):
            self._routes()

    def _modulation(self) -> None:
        c, b, d = self.config, self.batch, self.config.width
        branches = 3 if c.attention == "space-time" else 2
        if c.modulation in ("adaln-zero", "adaln"):
            parts = branches * (3 if c.modulation == "adaln-zero" else 2)
            formula = f"2·L·B·D·{parts}D"
            self._linear("blocks.modulation", c.depth, b, d, parts * d, formula, "sample")
            self._modulated_uses += c.depth
        elif c.modulation == "adaln-single":
            parts = 3 * branches
            self._linear("modulation", 1, b, d, parts * d, f"2·B·D·{parts}D", "sample")
            self._params["sample"] += c.depth * parts * d
            tables = c.depth * b * parts * d
            # Each table is added once a sample; its gradient sums over them, and the shared vectors' gradients meet.
            met = (c.depth - 1) * b * parts * d
            self._light("blocks.modulation", "modulation", f"L·B·{parts}D", (tables, tables + met))
            self._modulated_uses += 1

    def _block(self, times: int, share: float, mixture: bool, along: str) -> None:
        c = self.config
        sequences = self._sequences(share)
        frames = self.work.frames
        if along == "full":
            formula = "2·L·B·(T+S)²·D" if c.context == "in-context" else "2·L·B·T²·D"
            self._self_attention("blocks.attn", times, sequences, [(n, t, t) for n, t in sequences], formula)
        if along in ("space-time", "space"):
            pairs = [(n * frames, t // frames, t // frames) for n, t in sequences]
            self._self_attention("blocks.attn", times, sequences, pairs, "2·L·B·T²/frames·D")
        if along in ("space-time", "time"):
            pairs = [(n * (t // frames), frames, frames) for n, t in sequences]
            name = "blocks.temporal" if along == "space-time" else "blocks.attn"
            self._self_attention(name, times, sequences, pairs, "2·L·B·T·frames·D")
        if c.context == "cross-attention":
            self._cross_attention(times, share)
        self._norm("blocks.mlp", times, sequences)
        rows = sum(n * t for n, t in sequences)
        if mixture:
            self._mixture(times, rows)
        else:
            self._feed_forward("blocks.mlp", times, rows, "token")
            self._body += times * self._feed_forward_weights()
        self._residual("blocks.mlp", times, sequences)
        self._skip_last(times, rows, mixture)

    def _skip_last(self, times: int, rows: int, mixture: bool) -> None:
        """What repeating a block leaves out: it ends once all that its backward pass needs is there again.

        That is before the last addition, and before the last product where no gate needs its result. (A mixture's gates
        need the experts' results; the shared experts come last and have none.)
        """
        c = self.config
        if self.elementwise:
            self._skip("blocks.mlp.residual", self._last_residual)
        if c.modulation in ("adaln-zero", "adaln-single") or (mixture and not c.shared_experts):
            return
        name = "blocks.moe.shared" if mixture else "blocks.mlp"
        hidden = c.mlp_width * (c.shared_experts if mixture else 1)
        self._skip(f"{name}.fc2", 2 * times * rows * hidden * c.width)
        if self.elementwise:
            self._skip(f"{name}.bias", times * rows * c.width)
            if mixture:
                self._skip("blocks.moe.dispatch", times * rows * c.width)

    def _skip(self, name: str, flops: int) -> None:
        self._unrepeated[name] = self._unrepeated.get(name, 0) + flops

    def _self_attention(
        self, name: str, times: int, sequences: list[tuple[int, int]], pairs: Pairs, product: str
    ) -> None:
        c, d = self.config, self.config.width
        rows = sum(n * t for n, t in sequences)
        heads, width = c.heads + 2 * c.key_heads, d // c.heads
        self._norm(name, times, sequences)
        self._linear(f"{name}.qkv", times, rows, d, heads * width, self._qkv_formula, "token")
        self._qk_norm(name, times, rows, rows, "token", "token")
        self._rope(name, times, rows)
        self._scores(name, times, pairs, rows, product)
        self._linear(f"{name}.proj", times, rows, d, d, "2·L·B·T·D²", "token")
        self._residual(name, times, sequences)
        self._body += times * (d * heads * width + d * d)

    def _cross_attention(self, times: int, share: float) -> None:
        c, d, name = self.config, self.config.width, "blocks.cross"
        sequences = self._sequences(share)
        rows = sum(n * t for n, t in sequences)
        context = self._rows(self.work.groups, lambda t, s: self._context(s))
        width = 2 * c.key_heads * (d // c.heads)
        if c.cross_norm:
            self._norm(name, times, sequences, modulated=False)
        self._linear(f"{name}.q", times, rows, d, d, "2·L·B·T·D²", "token")
        self._linear(f"{name}.kv", times, context, d, width, "2·L·B·S·D·2GK", "context")
        self._qk_norm(name, times, rows, context, "token", "context")
        pairs = [(n, kept(t, share), self._context(s)) for n, t, s in self.work.groups]
        self._scores(name, times, pairs, rows, "2·L·B·T·S·D")
        self._linear(f"{name}.proj", times, rows, d, d, "2·L·B·T·D²", "token")
        self._residual(name, times, sequences, gated=False)
        self._body += times * 2 * d * d

    def _scores(self, name: str, times: int, pairs: Pairs, rows: int, formula: str) -> None:
        """The two products of attention over ``pairs``, and the softmax between them."""
        c = self.config
        h, k = c.heads, c.width // c.heads
        flops = bytes_moved = softmax = 0
        for n, queries, keys in pairs:
            flops += attention_cost.attention_flops_forward(n, h, queries, keys, k)
            bytes_moved += attention_cost.attention_bytes_forward(n, h, queries, keys, k, self.size)
            if self.elementwise:
                softmax += attention_cost.attention_softmax_flops_forward(n, h, queries, keys)
        half, moved = times * flops // 2, times * bytes_moved // 2
        self._add(f"{name}.scores", "attention", formula, half, 2 * half, moved, 2 * moved)
        self._add(f"{name}.values", "attention", formula, half, 2 * half, moved, 2 * moved)
        if self.elementwise:
            scores = sum(n * h * queries * keys for n, queries, keys in pairs)
            scaled = rows * h * k
            plain = (ew.softmax(scores)[0] + scaled, ew.softmax(scores)[1] + scaled)
            # Backward of the fused kernel: the plain softmax's, and the factor on every score.
            cost = (softmax, ew.softmax(scores)[1] + scores) if self.fused else plain
            self._light(f"{name}.softmax", "attention", "5·L·B·H·T²", (times * cost[0], times * cost[1]))

    def _qk_norm(self, name: str, times: int, rows: int, key_rows: int, who: str, key_who: str) -> None:
        c, k = self.config, self.config.width // self.config.heads
        if c.qk_norm == "none":
            return
        for heads, tokens, owner in ((c.heads, rows, who), (c.key_heads, key_rows, key_who)):
            per_head = c.qk_norm == "head"
            count, width = (tokens * heads, k) if per_head else (tokens, heads * k)
            self._params[owner] += times * width
            if self.elementwise:
                cost = ew.rms_norm(count, width, weighted=True)
                if per_head:
                    # The operator's count is for queries and keys together.
                    cost = (rotary_cost.qk_norm_rope_flops_forward(1, heads, tokens, k, True, False) // 2, cost[1])
                formula = "4 an element, 3 a row"
                self._light(f"{name}.qk_norm", "norm", formula, _scaled(times, cost), times * count * width)

    def _rope(self, name: str, times: int, rows: int) -> None:
        if self.config.rope:
            numbers = times * rows * (self.config.heads + self.config.key_heads) * (self.config.width // self.config.heads)
            self._light(f"{name}.rope", "embedding", "3·L·B·T·(H+G)·K", ew.rotate(numbers))

    def _feed_forward(self, name: str, times: int, rows: int, who: str, copies: int = 1, hidden: int | None = None) -> None:
        """Two layers with the activation between; ``copies`` experts share the rows."""
        c, d = self.config, self.config.width
        f = c.mlp_width if hidden is None else hidden
        gate = c.mlp == "swiglu"
        fused = self.fused and not gate
        first = "2·L·B·T·D·2F" if gate else "2·L·B·T·D·F"
        self._linear(
            f"{name}.fc1", times, rows, d, f * (1 + gate), first, who, bias_counted=not fused, copies=copies
        )
        self._activation(name, times, rows, f)
        self._linear(f"{name}.fc2", times, rows, f, d, "2·L·B·T·F·D", who, copies=copies)

    def _activation(self, name: str, times: int, rows: int, f: int) -> None:
        if not self.elementwise:
            return
        if self.config.mlp == "swiglu":
            self._light(f"{name}.swiglu", "activation", "5·L·B·T·F", ew.swiglu(times * rows * f), times * rows * f)
        elif self.fused:
            cost = gelu_cost.bias_gelu_flops_forward(rows, f), gelu_cost.bias_gelu_flops_backward(rows, f)
            self._light(f"{name}.gelu", "activation", "9·L·B·T·F", _scaled(times, cost), times * rows * f)
        else:
            self._light(f"{name}.gelu", "activation", "8·L·B·T·F", ew.gelu(times * rows * f), times * rows * f)

    def _feed_forward_weights(self) -> int:
        c = self.config
        return c.width * c.mlp_width * (3 if c.mlp == "swiglu" else 2)

    def _mixture(self, times: int, rows: int) -> None:
        c, d, e, k = self.config, self.config.width, self.config.experts, self.config.experts_per_token
        sent = rows * k
        if c.expert_capacity is not None:
            sent = e * math.ceil(c.expert_capacity * rows * k / e)
        self._linear("blocks.moe.router", times, rows, d, e, "2·L·B·T·D·E", "token", bias=False)
        self._feed_forward("blocks.moe", times, sent, "token", copies=e)
        self._body += times * (d * e + k * self._feed_forward_weights())
        one = self._feed_forward_weights() + c.mlp_width * (2 if c.mlp == "swiglu" else 1) + d
        self._idle += times * (e - k) * one
        shared = c.shared_experts
        if shared:
            self._feed_forward("blocks.moe.shared", times, rows, "token", hidden=shared * c.mlp_width)
            self._body += times * shared * self._feed_forward_weights()
        if self.elementwise:
            scores = ew.softmax(rows * e)
            # Softmax and top-k; then each row times its gate and added to its token, the way back likewise.
            forward = scores[0] + rows * e + 2 * sent * d + (rows * d if shared else 0)
            gathered = sent * d + sent + (2 + (d > 1)) * sent * d
            meeting = (1 + bool(shared)) * rows * d
            cost = (forward, scores[1] + gathered + meeting)
            self._light("blocks.moe.dispatch", "elementwise", "6·L·B·T·E + 2·L·rows·D", _scaled(times, cost))

    def _routes(self) -> None:
        """Gathering the kept tokens where the share changes, and putting them back."""
        c, d = self.config, self.config.width
        whole = sum(n * t for n, t in self._sequences(1.0))
        before = 1.0
        backward = 0
        for share in c.token_keep:
            if share != before and share < 1:
                part = sum(n * t for n, t in self._sequences(share))
                backward += part * d + whole * d
            before = share
        self._light("blocks.route", "elementwise", "gradients of kept tokens", (0, backward))

    # -- modulation, norms and residuals ----------------------------------------------------------------------------

    def _norm(
        self, name: str, times: int, sequences: list[tuple[int, int]], *, modulated: bool | None = None, who: str = "token"
    ) -> None:
        c, d = self.config, self.config.width
        rms = c.norm == "rms"
        if modulated is None:
            modulated = c.modulation != "none"
        if not modulated:
            self._params[who] += times * d * (1 if rms else 2)
        rows = sum(n * t for n, t in sequences)
        self.norm_elements += times * rows * d
        if not self.elementwise:
            return
        if not modulated:
            cost = ew.rms_norm(rows, d, weighted=True) if rms else ew.layer_norm(rows, d, affine=True)
            self._light(f"{name}.norm", "norm", "a norm with weight", _scaled(times, cost), times * rows * d)
            return
        if self.fused and not rms:
            cost = (
                adaln_cost.layernorm_modulate_flops_forward(1, rows, d),
                adaln_cost.layernorm_modulate_flops_backward(1, rows, d),
            )
        else:
            base = ew.rms_norm(rows, d, weighted=False) if rms else ew.layer_norm(rows, d, affine=False)
            vectors = rows * d if self.work.packed else self.batch * d
            cost = (base[0] + vectors + 2 * rows * d, base[1] + 2 * rows * d + 2 * self._summed(sequences) * d)
        self._light(f"{name}.norm", "modulation", "norm, scale and shift", _scaled(times, cost), times * rows * d)

    def _residual(
        self, name: str, times: int, sequences: list[tuple[int, int]], *, gated: bool | None = None
    ) -> None:
        if not self.elementwise:
            return
        c, d = self.config, self.config.width
        rows = sum(n * t for n, t in sequences)
        if gated is None:
            gated = c.modulation in ("adaln-zero", "adaln-single")
        if not gated:
            cost = (rows * d, 0)
        elif self.fused:
            cost = (
                adaln_cost.gate_residual_flops_forward(1, rows, d),
                adaln_cost.gate_residual_flops_backward(1, rows, d),
            )
        else:
            cost = (2 * rows * d, 2 * rows * d + self._summed(sequences) * d)
        self._last_residual = times * cost[0]
        # The stream goes to the branch and past it: its two gradients meet.
        cost = (cost[0], cost[1] + rows * d)
        self._light(f"{name}.residual", "modulation", "2·L·B·T·D" if gated else "L·B·T·D", _scaled(times, cost), times * rows * d)

    def _summed(self, sequences: list[tuple[int, int]]) -> int:
        """Rows that the gradient of a sample's vector sums over; a single token is no sum."""
        if self.work.packed:
            return sum(n * t for n, t in sequences)
        return sum(n * t for n, t in sequences if t > 1)

    # -- blocks with two streams -------------------------------------------------------------------------------------

    def _joint_blocks(self) -> None:
        c, d, b = self.config, self.config.width, self.batch
        image = [(n, t) for n, t, _ in self.work.groups]
        text = [(n, s) for n, _, s in self.work.groups]
        both = [(n, t + s) for n, t, s in self.work.groups]
        # Without single-stream blocks nobody reads the caption's stream after the last joint block: there it stops at
        # its keys and values (SD3), and its norm takes a shift and a scale only.
        through = c.depth if c.single_depth else c.depth - 1
        self._linear("blocks.modulation", c.depth, b, d, 6 * d, "2·L·B·D·6D", "sample")
        for times, parts in ((through, 6), (c.depth - through, 2)):
            if times:
                formula = "2·L·B·D·6D (the last block: 2D)"
                self._linear("blocks.context.modulation", times, b, d, parts * d, formula, "sample")
        self._stream("blocks", image, c.depth, "token")
        self._stream("blocks.context", text, through, "context")
        rows = sum(n * t for n, t in both)
        self._rope("blocks.attn", c.depth, rows)
        self._scores("blocks.attn", c.depth, [(n, t, t) for n, t in both], rows, "2·L·B·(T+S)²·D")
        heads = c.heads + 2 * c.key_heads
        self._body += c.depth * (d * heads * (d // c.heads) + d * d + self._feed_forward_weights())
        self._modulated_uses += 2 * c.depth + c.single_depth
        if self.elementwise:
            # The caption's stream is added to last; where it has stopped, the image's.
            self._skip("blocks.context.mlp.residual", 2 * sum(n * t for n, t in text) * d * through)
            self._skip("blocks.mlp.residual", 2 * sum(n * t for n, t in image) * d * (c.depth - through))
        if c.single_depth:
            self._single_blocks(both, rows)

    def _stream(self, name: str, sequences: list[tuple[int, int]], through: int, who: str) -> None:
        """One stream of the joint blocks, of which ``through`` go on after the keys and values."""
        c, d = self.config, self.config.width
        rows = sum(n * t for n, t in sequences)
        letter = "T" if who == "token" else "S"
        width = (c.heads + 2 * c.key_heads) * (d // c.heads)
        self._norm(f"{name}.attn", c.depth, sequences)
        self._linear(f"{name}.attn.qkv", c.depth, rows, d, width, self._qkv_formula.replace("T", letter), who)
        self._qk_norm(f"{name}.attn", c.depth, rows, rows, who, who)
        if through:
            self._linear(f"{name}.attn.proj", through, rows, d, d, f"2·L·B·{letter}·D²", who)
            self._residual(f"{name}.attn", through, sequences)
            self._norm(f"{name}.mlp", through, sequences)
            self._feed_forward(f"{name}.mlp", through, rows, who)
            self._residual(f"{name}.mlp", through, sequences)

    def _single_blocks(self, sequences: list[tuple[int, int]], rows: int) -> None:
        """One stream of image and caption; attention and feed-forward side by side (Flux)."""
        c, d, times = self.config, self.config.width, self.config.single_depth
        f, gate = c.mlp_width, c.mlp == "swiglu"
        qkv = (c.heads + 2 * c.key_heads) * (d // c.heads)
        self._linear("single.modulation", times, self.batch, d, 3 * d, "2·L·B·D·3D", "sample")
        self._norm("single", times, sequences)
        inner = qkv + f * (1 + gate)
        self._linear("single.linear1", times, rows, d, inner, "2·L·B·(T+S)·D·(3D+F)", "token", bias_counted=False)
        biases = times * rows * (qkv if self.fused and not gate else inner)
        self._light("single.bias", "elementwise", "1 an output", (biases, biases))
        self._qk_norm("single", times, rows, rows, "token", "token")
        self._rope("single", times, rows)
        self._scores("single", times, [(n, t, t) for n, t in sequences], rows, "2·L·B·(T+S)²·D")
        self._activation("single", times, rows, f)
        self._linear("single.linear2", times, rows, d + f, d, "2·L·B·(T+S)·(D+F)·D", "token")
        self._residual("single", times, sequences)
        self._skip("single.residual", self._last_residual)
        self._body += times * (d * inner + (d + f) * d)

    # -- output ------------------------------------------------------------------------------------------------------

    def _final(self) -> None:
        c, d, b = self.config, self.config.width, self.batch
        sequences = [(n, t) for n, t, _ in self.work.groups]
        if c.modulation in ("adaln-zero", "adaln"):
            self._linear("final.modulation", 1, b, d, 2 * d, "2·B·D·2D", "sample")
            self._modulated_uses += 1
        elif c.modulation == "adaln-single":
            self._params["sample"] += 2 * d
            # The table's gradient sums over samples, the time's over the two vectors.
            self._light("final.modulation", "modulation", "B·2D", (2 * b * d, 4 * b * d))
        self._norm("final", 1, sequences)
        rows = sum(n * t for n, t in sequences)
        out = c.patch_frames * c.patch**2 * c.out_channels
        self._linear("final.linear", 1, rows, d, out, "2·B·T·D·P²·C_out", "token")

    def _fan_out(self) -> None:
        """The condition's vector: its SiLU, and its gradients from all that it modulates."""
        c, vector = self.config, self.batch * self.config.width
        if c.modulation == "none":
            return
        forward, backward = ew.silu(vector)
        met = self._modulated_uses - 1 + (c.modulation == "adaln-single")
        self._light("condition.silu", "activation", "4·B·D", (forward, backward + met * vector))


def kept(tokens: int, share: float) -> int:
    """Image tokens that a block works on; the whole where ``share`` is 1."""
    return tokens if share == 1 else max(1, int(share * tokens))


def _scaled(times: int, cost: tuple[int, int]) -> tuple[int, int]:
    return times * cost[0], times * cost[1]
