"""The walk through a model that writes its ledger: every formula of ``docs/flops.md``, as integers. No torch.

Letters: B samples, T image tokens of a sample, S tokens of its condition, N tokens of a sequence, D width, H
heads, K head width, G key heads, F feed-forward width, P patch, C channels, L blocks, E experts. What a
formula says is the forward count; the backward count follows from it (twice, or once where no gradient of the
input is needed).
"""

from __future__ import annotations

from ditscale.dit import elementwise as ew
from ditscale.dit.config import DiTConfig
from ditscale.dit.parts import Pairs, Parts, Sequences, Workload, rows_of
from ditscale.errors import InputError


class Walk(Parts):
    """Walks through one configuration and writes it down.

    Arguments as :class:`ditscale.dit.parts.Parts`.
    """

    def __init__(self, config: DiTConfig, work: Workload, *, elementwise: bool, fused: bool, size: int) -> None:
        super().__init__(config, work, elementwise=elementwise, fused=fused, size=size)
        self._modulated_uses = 0
        self._inputs()
        if config.context == "joint":
            self._joint_blocks()
        else:
            self._blocks()
        self._final()
        if elementwise:
            self._fan_out()

    # -- token counts

    def _context(self, s: int) -> int:
        """Tokens of the condition, the time's among them where nothing else tells it."""
        return s + (self.config.modulation == "none")

    def _context_rows(self) -> int:
        """The same of the whole batch."""
        return sum(n * self._context(s) for n, _, s in self.work.groups)

    def _sequences(self, share: float) -> Sequences:
        """The block's own sequences where ``share`` of the image's tokens are kept."""
        joined = self.config.context == "in-context"
        return [(n, kept(t, share) + (self._context(s) if joined else 0)) for n, t, s in self.work.groups]

    # -- inputs

    def _inputs(self) -> None:
        c, b, d, half = self.config, self.batch, self.config.width, self.config.frequency_width // 2
        rows = sum(n * t for n, t, _ in self.work.groups)
        self.linear("patch_embed", 1, rows, c.patch_width, d, "2·B·T·P²C·D", "token", input_grad=False)
        if c.positions != "none":
            # A learned table is shared by the batch; one sample needs no sum over it, a packed one is
            # gathered.
            learned = c.positions == "learned" and (b > 1 or self.work.packed)
            self.light("positions", "elementwise", "B·T·D", (rows * d, rows * d if learned else 0))
        if c.positions == "learned":
            self.parameters("embedding", c.tokens * d)

        def scalar_embedding(name: str, fan_in: int, first: str) -> None:
            if name != "pooled":
                self.light(f"{name}.features", "embedding", "angle, sine, cosine", (3 * b * half, 0))
            self.linear(f"{name}.0", 1, b, fan_in, d, first, "sample", input_grad=False)
            self.light(f"{name}.silu", "activation", "4·B·D", ew.silu(b * d))
            self.linear(f"{name}.2", 1, b, d, d, "2·B·D²", "sample")

        scalar_embedding("time_mlp", c.frequency_width, "2·B·frequencies·D")
        added = 0
        if c.guidance_embed:
            scalar_embedding("guidance", c.frequency_width, "2·B·frequencies·D")
            added += 1
        if c.pooled_width:
            scalar_embedding("pooled", c.pooled_width, "2·B·pooled_width·D")
            added += 1
        if c.condition == "class":
            self.parameters("embedding", (c.num_classes + 1) * d)
            self.light("label", "embedding", "a row each", (0, b * d))
            added += c.context == "pooled"
        elif c.condition == "caption":
            added += c.context == "pooled"
            self._caption()
        if added:
            self.light("condition.sum", "elementwise", "B·D each", (added * b * d, 0))

    def _caption(self) -> None:
        c, b, d, w = self.config, self.batch, self.config.width, self.config.caption_width
        words = sum(n * s for n, _, s in self.work.groups) if c.context != "pooled" else b * c.caption_tokens
        learned = c.vocabulary_size > 0
        if learned:
            self.parameters("embedding", c.vocabulary_size * w)
            self.light("caption.words", "embedding", "a row each", (0, words * w))
        pooled = c.context == "pooled"
        rows, who = (b, "sample") if pooled else (words, "context")
        if pooled and self.elementwise:
            if not c.caption_tokens:
                raise InputError("caption_tokens: expected the words of a caption for the convention all, got 0")
            # Which words are padding, the mean over the others.
            self.light(
                "caption.mean",
                "embedding",
                "2·B·S·W",
                (2 * words * w + 2 * words + b + b * w, words * w + b * w),
            )
        if c.caption_layers == 1:
            formula = "2·B·caption_width·D" if pooled else "2·B·S·caption_width·D"
            self.linear("caption.proj", 1, rows, w, d, formula, who, input_grad=learned)
            return
        self.linear("caption.fc1", 1, rows, w, d, "2·B·S·caption_width·D", who, input_grad=learned)
        self.light("caption.gelu", "activation", "8·B·S·D", ew.gelu(rows * d))
        self.linear("caption.fc2", 1, rows, d, d, "2·B·S·D²", who)

    # -- blocks with one stream

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
            shared = (c.depth - 1) * self._context_rows() * c.width
            self.light("blocks.cross.fan_out", "elementwise", "gradients of S tokens meet", (0, shared))
        if self.elementwise and any(share < 1 for share in c.token_keep):
            self._routes()

    def _modulation(self) -> None:
        c, b, d = self.config, self.batch, self.config.width
        branches = 3 if c.attention == "space-time" else 2
        if c.modulation in ("adaln-zero", "adaln"):
            parts = branches * (3 if c.modulation == "adaln-zero" else 2)
            formula = f"2·L·B·D·{parts}D"
            self.linear("blocks.modulation", c.depth, b, d, parts * d, formula, "sample")
            self._modulated_uses += c.depth
        elif c.modulation == "adaln-single":
            parts = 3 * branches
            self.linear("modulation", 1, b, d, parts * d, f"2·B·D·{parts}D", "sample")
            self.parameters("sample", c.depth * parts * d)
            tables = c.depth * b * parts * d
            # Each table is added once a sample; its gradient sums over them, and the shared vectors'
            # gradients meet.
            met = (c.depth - 1) * b * parts * d
            self.light("blocks.modulation", "modulation", f"L·B·{parts}D", (tables, tables + met))
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
        rows = rows_of(sequences)
        sent = 0
        if mixture:
            sent = self._mixture(times, rows)
        else:
            self._feed_forward("blocks.mlp", times, rows, "token")
            self.body(times * self._feed_forward_weights())
        self._residual("blocks.mlp", times, sequences)
        self._skip_last(times, rows, sent)

    def _skip_last(self, times: int, rows: int, sent: int) -> None:
        """What repeating a block leaves out: it ends once all that its backward pass needs is there again.

        That is before the last addition, and before the last product where no gate needs its result in this block. A
        mixture (with ``sent`` rows) adds its experts' results up before the shared experts run.
        """
        c, d = self.config, self.config.width
        self.skip("blocks.mlp.residual", self._last_residual)
        gated = c.modulation in ("adaln-zero", "adaln-single")
        name = "blocks.moe.shared" if sent else "blocks.mlp"
        hidden = c.mlp_width * (c.shared_experts if sent else 1)
        if not sent or c.shared_experts:
            self.skip(f"{name}.fc2", 2 * times * rows * hidden * d, fused=gated)
        if gated:
            return
        if sent and not c.shared_experts:
            self.skip("blocks.moe.dispatch", times * sent * d)
            return
        self.skip(f"{name}.bias", times * rows * d)
        if sent:
            self.skip("blocks.moe.dispatch", times * rows * d)

    def _self_attention(self, name: str, times: int, sequences: Sequences, pairs: Pairs, product: str) -> None:
        c, d = self.config, self.config.width
        rows = rows_of(sequences)
        heads, width = c.heads + 2 * c.key_heads, d // c.heads
        self._norm(name, times, sequences)
        self.linear(f"{name}.qkv", times, rows, d, heads * width, self._qkv_formula, "token")
        self._qk_norm(name, times, rows, rows, "token", "token")
        self._rope(name, times, rows)
        self._scores(name, times, pairs, rows, product)
        self.linear(f"{name}.proj", times, rows, d, d, "2·L·B·T·D²", "token")
        self._residual(name, times, sequences)
        self.body(times * (d * heads * width + d * d))

    def _cross_attention(self, times: int, share: float) -> None:
        c, d, name = self.config, self.config.width, "blocks.cross"
        sequences = self._sequences(share)
        rows = rows_of(sequences)
        context = self._context_rows()
        width = 2 * c.key_heads * (d // c.heads)
        if c.cross_norm:
            self._norm(name, times, sequences, modulated=False)
        self.linear(f"{name}.q", times, rows, d, d, "2·L·B·T·D²", "token")
        self.linear(f"{name}.kv", times, context, d, width, "2·L·B·S·D·2GK", "context")
        self._qk_norm(name, times, rows, context, "token", "context")
        pairs = [(n, kept(t, share), self._context(s)) for n, t, s in self.work.groups]
        self._scores(name, times, pairs, rows, "2·L·B·T·S·D")
        self.linear(f"{name}.proj", times, rows, d, d, "2·L·B·T·D²", "token")
        self._residual(name, times, sequences, gated=False)
        self.body(times * 2 * d * d)

    def _routes(self) -> None:
        """Gathering the kept tokens where the share changes, and putting them back."""
        c, d = self.config, self.config.width
        whole = rows_of(self._sequences(1.0))
        before = 1.0
        backward = 0
        for share in c.token_keep:
            if share != before and share < 1:
                part = rows_of(self._sequences(share))
                backward += part * d + whole * d
            before = share
        self.light("blocks.route", "elementwise", "gradients of kept tokens", (0, backward))

    # -- blocks with two streams

    def _joint_blocks(self) -> None:
        c, d, b = self.config, self.config.width, self.batch
        image = [(n, t) for n, t, _ in self.work.groups]
        text = [(n, s) for n, _, s in self.work.groups]
        both = [(n, t + s) for n, t, s in self.work.groups]
        # Without single-stream blocks nobody reads the caption's stream after the last joint block: there it
        # stops at its keys and values (SD3), and its norm takes a shift and a scale only.
        through = c.depth if c.single_depth else c.depth - 1
        self.linear("blocks.modulation", c.depth, b, d, 6 * d, "2·L·B·D·6D", "sample")
        for times, parts in ((through, 6), (c.depth - through, 2)):
            if times:
                formula = "2·L·B·D·6D (the last block: 2D)"
                self.linear("blocks.context.modulation", times, b, d, parts * d, formula, "sample")
        self._stream("blocks", image, c.depth, "token")
        self._stream("blocks.context", text, through, "context")
        rows = rows_of(both)
        self._rope("blocks.attn", c.depth, rows)
        self._scores("blocks.attn", c.depth, [(n, t, t) for n, t in both], rows, "2·L·B·(T+S)²·D")
        heads = c.heads + 2 * c.key_heads
        self.body(c.depth * (d * heads * (d // c.heads) + d * d + self._feed_forward_weights()))
        self._modulated_uses += 2 * c.depth + c.single_depth
        # The caption's stream is added to last; where it has stopped, the image's.
        for name, stream, times in (("blocks.context.mlp", text, through), ("blocks.mlp", image, c.depth - through)):
            rows_of_stream = rows_of(stream)
            self.skip(f"{name}.residual", 2 * rows_of_stream * d * times)
            self.skip(f"{name}.fc2", 2 * rows_of_stream * c.mlp_width * d * times, fused=True)
        if c.single_depth:
            self._single_blocks(both, rows)

    def _stream(self, name: str, sequences: Sequences, through: int, who: str) -> None:
        """One stream of the joint blocks, of which ``through`` go on after the keys and values."""
        c, d = self.config, self.config.width
        rows = rows_of(sequences)
        letter = "T" if who == "token" else "S"
        width = (c.heads + 2 * c.key_heads) * (d // c.heads)
        self._norm(f"{name}.attn", c.depth, sequences)
        self.linear(f"{name}.attn.qkv", c.depth, rows, d, width, self._qkv_formula.replace("T", letter), who)
        self._qk_norm(f"{name}.attn", c.depth, rows, rows, who, who)
        if through:
            self.linear(f"{name}.attn.proj", through, rows, d, d, f"2·L·B·{letter}·D²", who)
            self._residual(f"{name}.attn", through, sequences)
            self._norm(f"{name}.mlp", through, sequences)
            self._feed_forward(f"{name}.mlp", through, rows, who)
            self._residual(f"{name}.mlp", through, sequences)

    def _single_blocks(self, sequences: Sequences, rows: int) -> None:
        """One stream of image and caption; attention and feed-forward side by side (Flux)."""
        c, d, times = self.config, self.config.width, self.config.single_depth
        f, gate = c.mlp_width, c.mlp == "swiglu"
        qkv = (c.heads + 2 * c.key_heads) * (d // c.heads)
        self.linear("single.modulation", times, self.batch, d, 3 * d, "2·L·B·D·3D", "sample")
        self._norm("single", times, sequences)
        inner = qkv + f * (1 + gate)
        self.linear("single.linear1", times, rows, d, inner, "2·L·B·(T+S)·D·(3D+F)", "token", bias_counted=False)
        biases = times * rows * (qkv if self.fused and not gate else inner)
        self.light("single.bias", "elementwise", "1 an output", (biases, biases))
        self._qk_norm("single", times, rows, rows, "token", "token")
        self._rope("single", times, rows)
        self._scores("single", times, [(n, t, t) for n, t in sequences], rows, "2·L·B·(T+S)²·D")
        self._activation("single", times, rows, f)
        self.linear("single.linear2", times, rows, d + f, d, "2·L·B·(T+S)·(D+F)·D", "token")
        self._residual("single", times, sequences)
        self.skip("single.residual", self._last_residual)
        self.skip("single.linear2", 2 * times * rows * (d + f) * d, fused=True)
        self.body(times * (d * inner + (d + f) * d))

    # -- output

    def _final(self) -> None:
        c, d, b = self.config, self.config.width, self.batch
        sequences = [(n, t) for n, t, _ in self.work.groups]
        if c.modulation in ("adaln-zero", "adaln"):
            self.linear("final.modulation", 1, b, d, 2 * d, "2·B·D·2D", "sample")
            self._modulated_uses += 1
        elif c.modulation == "adaln-single":
            self.parameters("sample", 2 * d)
            # The table's gradient sums over samples, the time's over the two vectors.
            self.light("final.modulation", "modulation", "B·2D", (2 * b * d, 4 * b * d))
        self._norm("final", 1, sequences)
        rows = rows_of(sequences)
        out = c.patch_frames * c.patch**2 * c.out_channels
        self.linear("final.linear", 1, rows, d, out, "2·B·T·D·P²·C_out", "token")

    def _fan_out(self) -> None:
        """The condition's vector: its SiLU, and its gradients from all that it modulates."""
        c, vector = self.config, self.batch * self.config.width
        if c.modulation == "none":
            return
        forward, backward = ew.silu(vector)
        met = self._modulated_uses - 1 + (c.modulation == "adaln-single")
        self.light("condition.silu", "activation", "4·B·D", (forward, backward + met * vector))


def kept(tokens: int, share: float) -> int:
    """Image tokens that a block works on; the whole where ``share`` is 1."""
    return tokens if share == 1 else max(1, int(share * tokens))
