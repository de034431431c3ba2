"""The parts that blocks are made of: norms, attention, feed-forward, mixture, residuals. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ditscale.dit import elementwise as ew
from ditscale.dit.config import DiTConfig
from ditscale.dit.sheet import Sheet
from ditscale.kernels.adaln import cost as adaln_cost
from ditscale.kernels.attn import cost as attention_cost
from ditscale.kernels.gelu import cost as gelu_cost
from ditscale.kernels.rotary import cost as rotary_cost

Tokens = tuple[int, int, int]  # samples, image tokens of each, tokens of each one's condition
Sequences = list[tuple[int, int]]  # sequences, tokens of each
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


class Parts(Sheet):
    """Writes single parts of a model down; what they are put together to is the walk's matter.

    Args:
        config: the model.
        work: what it is run on.
        elementwise: write the lines of elementwise work too (convention ``all``).
        fused: count the operators of ``ditscale.kernels`` as those do; otherwise as the plain operations that
            they replace.
        size: bytes of an element.
    """

    def __init__(self, config: DiTConfig, work: Workload, *, elementwise: bool, fused: bool, size: int) -> None:
        super().__init__(elementwise=elementwise, size=size)
        self.config = config
        self.work = work
        self.fused = fused
        self.batch = work.batch
        self.norm_elements = 0
        self._last_residual = 0
        self._qkv_formula = "2·L·B·T·D·3D" if config.kv_heads is None else "2·L·B·T·D·(H+2G)K"

    def _scores(self, name: str, times: int, pairs: Pairs, rows: int, formula: str) -> None:
        """The two products of attention over ``pairs``, and the softmax between them."""
        c = self.config
        h, k = c.heads, c.width // c.heads
        forward = backward = again = read = written = softmax = 0
        for n, queries, keys in pairs:
            forward += attention_cost.attention_flops_forward(n, h, queries, keys, k)
            backward += attention_cost.attention_flops_backward(n, h, queries, keys, k)
            again += attention_cost.attention_flops_backward_hardware(n, h, queries, keys, k)
            read += attention_cost.attention_bytes_forward(n, h, queries, keys, k, self.size)
            written += attention_cost.attention_bytes_backward(n, h, queries, keys, k, self.size)
            if self.elementwise:
                softmax += attention_cost.attention_softmax_flops_forward(n, h, queries, keys)
        for product in ("scores", "values"):  # of one size; the operator's traffic is theirs together
            self.add(
                f"{name}.{product}",
                "attention",
                formula,
                times * forward // 2,
                times * backward // 2,
                bytes_forward=times * read // 2,
                bytes_backward=times * written // 2,
            )
        self.kernel_repeats(f"{name}.scores", repeated=times * (again - backward))
        if self.elementwise:
            scores = sum(n * h * queries * keys for n, queries, keys in pairs)
            scaled = rows * h * k
            plain = (ew.softmax(scores)[0] + scaled, ew.softmax(scores)[1] + scaled)
            # Backward of the fused kernel: the plain softmax's, and the factor on every score.
            operator = (softmax, ew.softmax(scores)[1] + scores)
            cost = operator if self.fused else plain
            self.light(f"{name}.softmax", "attention", "5·L·B·H·T²", (times * cost[0], times * cost[1]))

    def _qk_norm(self, name: str, times: int, rows: int, key_rows: int, who: str, key_who: str) -> None:
        c, k = self.config, self.config.width // self.config.heads
        if c.qk_norm == "none":
            return
        for heads, tokens, owner in ((c.heads, rows, who), (c.key_heads, key_rows, key_who)):
            per_head = c.qk_norm == "head"
            count, width = (tokens * heads, k) if per_head else (tokens, heads * k)
            self.parameters(owner, times * width)
            if self.elementwise:
                cost = ew.rms_norm(count, width, weighted=True)
                if per_head:
                    # The operator's count is for queries and keys together.
                    cost = (
                        rotary_cost.qk_norm_rope_flops_forward(1, heads, tokens, k, True, False) // 2,
                        cost[1],
                    )
                formula = "4 an element, 3 a row"
                self.light(f"{name}.qk_norm", "norm", formula, scaled(times, cost), numbers=times * count * width)

    def _rope(self, name: str, times: int, rows: int) -> None:
        if self.config.rope:
            c = self.config
            turned = times * rows * (c.heads + c.key_heads) * (c.width // c.heads)
            self.light(f"{name}.rope", "embedding", "3·L·B·T·(H+G)·K", ew.rotate(turned))

    def _feed_forward(
        self, name: str, times: int, rows: int, who: str, copies: int = 1, hidden: int | None = None
    ) -> None:
        """Two layers with the activation between; ``copies`` experts share the rows."""
        c, d = self.config, self.config.width
        f = c.mlp_width if hidden is None else hidden
        gate = c.mlp == "swiglu"
        fused = self.fused and not gate
        first = "2·L·B·T·D·2F" if gate else "2·L·B·T·D·F"
        self.linear(f"{name}.fc1", times, rows, d, f * (1 + gate), first, who, bias_counted=not fused, copies=copies)
        self._activation(name, times, rows, f)
        self.linear(f"{name}.fc2", times, rows, f, d, "2·L·B·T·F·D", who, copies=copies)

    def _activation(self, name: str, times: int, rows: int, f: int) -> None:
        if not self.elementwise:
            return
        if self.config.mlp == "swiglu":
            self.light(
                f"{name}.swiglu",
                "activation",
                "5·L·B·T·F",
                ew.swiglu(times * rows * f),
                numbers=times * rows * f,
            )
        elif self.fused:
            operator = gelu_cost.bias_gelu_flops_forward(rows, f), gelu_cost.bias_gelu_flops_backward(rows, f)
            self.light(f"{name}.gelu", "activation", "9·L·B·T·F", scaled(times, operator), numbers=times * rows * f)
        else:
            self.light(f"{name}.gelu", "activation", "8·L·B·T·F", ew.gelu(times * rows * f), numbers=times * rows * f)

    def _feed_forward_weights(self) -> int:
        c = self.config
        return c.width * c.mlp_width * (3 if c.mlp == "swiglu" else 2)

    def _mixture(self, times: int, rows: int) -> int:
        """The router, its experts and the shared ones; returns the rows that the experts work on."""
        c, d, e, k = self.config, self.config.width, self.config.experts, self.config.experts_per_token
        sent = rows * k
        if c.expert_capacity is not None:
            sent = e * math.ceil(c.expert_capacity * rows * k / e)
        self.linear("blocks.moe.router", times, rows, d, e, "2·L·B·T·D·E", "token", bias=False)
        self._feed_forward("blocks.moe", times, sent, "token", copies=e)
        self.body(times * (d * e + k * self._feed_forward_weights()))
        one = self._feed_forward_weights() + c.mlp_width * (2 if c.mlp == "swiglu" else 1) + d
        self.body(0, idle=times * (e - k) * one)
        shared = c.shared_experts
        if shared:
            self._feed_forward("blocks.moe.shared", times, rows, "token", hidden=shared * c.mlp_width)
            self.body(times * shared * self._feed_forward_weights())
        if self.elementwise:
            scores = ew.softmax(rows * e)
            # Softmax and top-k; then each row times its gate and added to its token, the way back likewise.
            forward = scores[0] + rows * e + 2 * sent * d + (rows * d if shared else 0)
            gathered = sent * d + sent + (2 + (d > 1)) * sent * d
            meeting = (1 + bool(shared)) * rows * d
            cost = (forward, scores[1] + gathered + meeting)
            self.light("blocks.moe.dispatch", "elementwise", "6·L·B·T·E + 2·L·rows·D", scaled(times, cost))
        return sent

    def _norm(self, name: str, times: int, sequences: Sequences, *, modulated: bool | None = None) -> None:
        c, d = self.config, self.config.width
        rms = c.norm == "rms"
        if modulated is None:
            modulated = c.modulation != "none"
        if not modulated:
            self.parameters("token", times * d * (1 if rms else 2))
        rows = rows_of(sequences)
        self.norm_elements += times * rows * d
        if not self.elementwise:
            return
        if not modulated:
            cost = ew.rms_norm(rows, d, weighted=True) if rms else ew.layer_norm(rows, d, affine=True)
            self.light(f"{name}.norm", "norm", "a norm with weight", scaled(times, cost), numbers=times * rows * d)
            return
        if self.fused and not rms:
            # "operator" is what cost.py tells of an operator: the test that changes every number of a formula leaves it
            # to the tests of the operators.
            operator = (
                adaln_cost.layernorm_modulate_flops_forward(1, rows, d),
                adaln_cost.layernorm_modulate_flops_backward(1, rows, d),
            )
            cost = operator
        else:
            base = ew.rms_norm(rows, d, weighted=False) if rms else ew.layer_norm(rows, d, affine=False)
            vectors = rows * d if self.work.packed else self.batch * d
            cost = (
                base[0] + vectors + 2 * rows * d,
                base[1] + 2 * rows * d + 2 * self._summed(sequences) * d,
            )
        self.light(
            f"{name}.norm",
            "modulation",
            "norm, scale and shift",
            scaled(times, cost),
            numbers=times * rows * d,
        )

    def _residual(self, name: str, times: int, sequences: Sequences, *, gated: bool | None = None) -> None:
        if not self.elementwise:
            return
        c, d = self.config, self.config.width
        rows = rows_of(sequences)
        if gated is None:
            gated = c.modulation in ("adaln-zero", "adaln-single")
        if not gated:
            cost = (rows * d, 0)
        elif self.fused:
            operator = (
                adaln_cost.gate_residual_flops_forward(1, rows, d),
                adaln_cost.gate_residual_flops_backward(1, rows, d),
            )
            cost = operator
        else:
            cost = (2 * rows * d, 2 * rows * d + self._summed(sequences) * d)
        self._last_residual = times * cost[0]
        # The stream goes to the branch and past it: its two gradients meet.
        cost = (cost[0], cost[1] + rows * d)
        formula = "2·L·B·T·D" if gated else "L·B·T·D"
        self.light(f"{name}.residual", "modulation", formula, scaled(times, cost), numbers=times * rows * d)

    def _summed(self, sequences: Sequences) -> int:
        """Rows that the gradient of a sample's vector sums over; a single token is no sum."""
        if self.work.packed:
            return rows_of(sequences)
        return sum(n * t for n, t in sequences if t > 1)


def rows_of(sequences: Sequences) -> int:
    """Tokens of all sequences together."""
    return sum(n * t for n, t in sequences)


def scaled(times: int, cost: tuple[int, int]) -> tuple[int, int]:
    """Forward and backward cost of ``times`` equal parts."""
    return times * cost[0], times * cost[1]
