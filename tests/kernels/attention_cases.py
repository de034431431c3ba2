"""Calls of attention for tests: inputs, the operator on a backend, plain PyTorch's lines, a float64 twin in numpy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from oracles import Array, judge_draws, wide
from torch import Tensor

from ditscale import kernels

# What Triton's interpreter and the emulated CUDA kernels run by default: a call of every kind, each dtype, the widths of DiT-S
# and DiT-XL, one that is not aligned; emulated also a head of every width that kernels are compiled for. They take a thousand
# times as long as a CPU kernel; the rest is slow tests.
QUICK_INTERPRETED = {
    "test_values_and_gradients": "one-of-each-fp32|dit-s-bf16|dit-xl-fp32|odd-fp16",
    "test_cross_attention": "33-200-fp16",
    "test_grouped_queries": "4-2-40",
    "test_lengths": "bf16",
    "test_key_bias": "mask-bf16",
    "test_packed_sequences": "fp16",
    "test_packed_sequences_across": "",
    "test_random_calls": "-[01]]",
    "test_packed_is_the_same_to_the_bit": "odd-bf16",
    "test_empty": "",
    "test_a_scale_that_is_zero_in_float32": "",
    "test_nan_of_a_query_stays_in_its_row": "bf16|fp32",
    "test_nan_of_a_key_or_value_reaches_every_query_of_its_head": "",
    "test_keys_beyond_the_lengths_are_never_read": "nan",
    "test_keys_outside_the_sequences_are_never_read": "",
}
QUICK_EMULATED = {
    "test_values_and_gradients": "dit-xl-bf16|head-80-fp16|head-96-bf16|head-128-fp16|head-128-fp32",
    "test_key_bias_beside_lengths": "emulated",
    "test_key_bias_of_many_blocks": "emulated",
    "test_keys_masked_in_front": "emulated",
}


@dataclass
class AttentionCall:
    """One call. ``cu``: where packed sequences start and end, of queries and of keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lengths: Tensor | None = None
    scale: float | None = None
    key_bias: Tensor | None = None
    cu: tuple[Tensor, Tensor] | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        graded = self.key_bias is not None and self.key_bias.is_floating_point()
        self.names = ("out", "dq", "dk", "dv", "dkey_bias") if graded else ("out", "dq", "dk", "dv")

    def _graded(self, function: object) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        bias = self.key_bias
        if len(self.names) == 5:
            bias = self.key_bias.detach().requires_grad_()  # type: ignore[union-attr]
            leaves.append(bias)
        out = function(*leaves[:3], bias)  # type: ignore[operator]
        return dict(zip(self.names, (out, *torch.autograd.grad(out, leaves, self.dout)), strict=True))

    def run(self, backend: str) -> dict[str, Tensor]:
        packed = {} if self.cu is None else {"cu_seqlens": self.cu[0], "cu_seqlens_k": self.cu[1]}
        return self._graded(
            lambda q, k, v, bias: kernels.attention(
                q, k, v, scale=self.scale, lengths=self.lengths, key_bias=bias, backend=backend, **packed
            )
        )

    @property
    def factor(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def spans(self) -> list[tuple[int, slice, slice]]:
        """The sequences: sample, queries, keys that count."""
        if self.cu is not None:
            ends = [t.tolist() for t in self.cu]
            pairs = zip(*([slice(a, b) for a, b in zip(e, e[1:], strict=False)] for e in ends), strict=True)
            return [(0, queries, keys) for queries, keys in pairs]
        T, S = self.q.shape[2], self.k.shape[2]
        counts = [S] * self.q.shape[0] if self.lengths is None else self.lengths.tolist()
        return [(b, slice(0, T), slice(0, n)) for b, n in enumerate(counts)]

    def plain(self) -> dict[str, Tensor]:
        """The three lines of a model at the same dtype, each sequence by itself."""

        def lines(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            out = torch.zeros_like(q)
            for b, queries, keys in self.spans():
                s = (q[b, :, queries] @ k[b, :, keys].transpose(-1, -2)) * self.factor
                if bias is not None:
                    bias_s = bias if bias.dim() == 1 else bias[b] if bias.dim() == 3 else bias[b][None]
                    bias_s = bias_s[..., keys].unsqueeze(-2)
                    if bias.dtype == torch.bool:
                        s = s.masked_fill(~bias_s, float("-inf"))
                    else:
                        s = s + bias_s.to(s.dtype)
                p = torch.nan_to_num(torch.softmax(s, -1)) if bias is not None else torch.softmax(s, -1)
                out[b, :, queries] = p @ v[b, :, keys]
            return out

        return self._graded(lines)

    def oracle(self) -> dict[str, Array]:
        q, k, v, do = (wide(t) for t in (self.q, self.k, self.v, self.dout))
        B, H, S = q.shape[0], q.shape[1], k.shape[2]
        group = H // k.shape[1] if k.shape[1] else 1
        out, dq, dk, dv = np.zeros_like(do), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        bias, dbias = np.zeros((B, H, S)), np.zeros((B, H, S))
        if self.key_bias is not None:
            given = self.key_bias.detach()
            given = given.double() if given.is_floating_point() else torch.where(given, 0.0, -torch.inf).double()
            bias = np.broadcast_to((given.unsqueeze(1) if given.dim() == 2 else given).numpy(), (B, H, S))
        for b, queries, keys in self.spans():
            if keys.start == keys.stop or queries.start == queries.stop:
                continue
            for h in range(H):
                kk, vv, dd = k[b, h // group, keys], v[b, h // group, keys], do[b, h, queries]
                s = self.factor * q[b, h, queries] @ kk.T + bias[b, h, keys]
                top = s.max(-1, keepdims=True)
                p = np.exp(s - np.where(np.isinf(top), 0.0, top))
                total = p.sum(-1, keepdims=True)
                p = np.divide(p, total, out=np.zeros_like(p), where=total > 0)
                out[b, h, queries] = p @ vv
                dp = dd @ vv.T
                ds = p * (dp - (p * dp).sum(-1, keepdims=True))
                dbias[b, h, keys] += ds.sum(0)
                dq[b, h, queries] = self.factor * ds @ kk
                dk[b, h // group, keys] += self.factor * ds.T @ q[b, h, queries]
                dv[b, h // group, keys] += p.T @ dd
        found = {"out": out, "dq": dq, "dk": dk, "dv": dv}
        if len(self.names) == 5:
            rank = self.key_bias.dim()  # type: ignore[union-attr]
            found["dkey_bias"] = dbias if rank == 3 else dbias.sum(1) if rank == 2 else dbias.sum((0, 1))
        return found

    def terms(self) -> dict[str, float]:
        """Largest term of the gradients of scores, which are differences: where they cancel, a rounding of it is left."""
        q, k, v, do = (float(t.double().abs().max()) if t.numel() else 0.0 for t in (self.q, self.k, self.v, self.dout))
        score = do * v * self.q.shape[-1] ** 0.5
        return {"dq": abs(self.factor) * score * k, "dk": abs(self.factor) * score * q, "dkey_bias": score}


def check(calls: list[AttentionCall], backend: str) -> None:
    """The twice-PyTorch rule over the pooled errors of calls that differ in their numbers only."""
    runs = [(c.run(backend), c.oracle(), c.plain(), c.terms()) for c in calls]
    for name in calls[0].names:
        for got, *_ in runs:
            assert got[name].dtype == (torch.float32 if name == "dkey_bias" else calls[0].q.dtype), name
        judge_draws(name, [(got[name], exact[name], plain[name], t.get(name, 0.0)) for got, exact, plain, t in runs])


def make(
    B: int,
    H: int,
    T: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    *,
    S: int | None = None,
    H_kv: int | None = None,
    size: float = 1.0,
    lengths: list[int] | None = None,
    key_bias: str | None = None,
    cu: tuple[list[int], list[int]] | None = None,
) -> AttentionCall:
    """A random call; queries, keys and values are parts of one projection where their shapes allow it.

    ``key_bias``: "shared" [S], "sample" [B, S], "head" [B, H, S], or "mask" [B, S] bool.
    """

    def draw(*dims: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(*dims, dtype=torch.float64)).to(dtype)

    if S is None and H_kv is None:
        q, k, v = draw(B, T, 3, H, K, by=size).permute(2, 0, 3, 1, 4)
    else:
        q = draw(B, T, H, K, by=size).transpose(1, 2)
        k, v = draw(B, T if S is None else S, 2, H_kv or H, K, by=size).permute(2, 0, 3, 1, 4)
    S = k.shape[2]
    bias = None
    if key_bias == "mask":
        bias = torch.rand(B, S) < 0.7
    elif key_bias is not None:
        bias = torch.randn({"shared": (S,), "sample": (B, S), "head": (B, H, S)}[key_bias])
    dout = draw(B, T, H, K).transpose(1, 2)
    ends = None if cu is None else (torch.tensor(cu[0], dtype=torch.int32), torch.tensor(cu[1], dtype=torch.int32))
    return AttentionCall(q, k, v, dout, None if lengths is None else torch.tensor(lengths), None, bias, ends)
