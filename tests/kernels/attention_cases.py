"""Calls of attention for tests: inputs, the operator on a backend, plain PyTorch's lines, a float64 twin in numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from oracles import Array, judge_draws, wide
from torch import Tensor

from ditscale import kernels
from ditscale.kernels import library


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """The backends of attention that run here."""
    name: str = request.param
    if name == "cpu" and library.missing_reason("cpu"):
        pytest.skip(str(library.missing_reason("cpu")))
    return name


@dataclass
class AttentionCall:
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lengths: Tensor | None = None
    scale: float | None = None

    def _graded(self, function: object) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        out = function(*leaves)  # type: ignore[operator]
        return dict(zip(("out", "dq", "dk", "dv"), (out, *torch.autograd.grad(out, leaves, self.dout)), strict=True))

    def run(self, backend: str) -> dict[str, Tensor]:
        return self._graded(
            lambda q, k, v: kernels.attention(q, k, v, scale=self.scale, lengths=self.lengths, backend=backend)
        )

    def plain(self) -> dict[str, Tensor]:
        """The three lines of a model at the same dtype, masked by -inf."""

        def lines(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            group = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            s = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if self.scale is None else self.scale)
            if self.lengths is None:
                return torch.softmax(s, -1) @ v
            beyond = torch.arange(k.shape[2]) >= self.lengths.view(-1, 1, 1, 1)
            return torch.nan_to_num(torch.softmax(s.masked_fill(beyond, float("-inf")), -1)) @ v

        return self._graded(lines)

    def oracle(self) -> dict[str, Array]:
        q, k, v, do = (wide(t) for t in (self.q, self.k, self.v, self.dout))
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        group = q.shape[1] // k.shape[1]
        out, dq, dk, dv = np.zeros_like(do), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
        for b in range(q.shape[0]):
            n = k.shape[2] if self.lengths is None else int(self.lengths[b])
            if n == 0 or q.shape[2] == 0:
                continue
            for h in range(q.shape[1]):
                kk, vv = k[b, h // group, :n], v[b, h // group, :n]
                s = scale * q[b, h] @ kk.T
                p = np.exp(s - s.max(-1, keepdims=True))
                p /= p.sum(-1, keepdims=True)
                out[b, h] = p @ vv
                dp = do[b, h] @ vv.T
                ds = scale * p * (dp - (p * dp).sum(-1, keepdims=True))
                dq[b, h] = ds @ kk
                dk[b, h // group, :n] += ds.T @ q[b, h]
                dv[b, h // group, :n] += p.T @ do[b, h]
        return {"out": out, "dq": dq, "dk": dk, "dv": dv}

    def terms(self) -> dict[str, float]:
        """Largest term of the gradients of scores, which are differences: where they cancel, a rounding of it is left."""
        q, k, v, do = (float(t.double().abs().max()) if t.numel() else 0.0 for t in (self.q, self.k, self.v, self.dout))
        scale = self.q.shape[-1] ** -0.5 if self.scale is None else abs(self.scale)
        score = scale * do * v * self.q.shape[-1] ** 0.5
        return {"dq": score * k, "dk": score * q}


def check(calls: list[AttentionCall], backend: str) -> None:
    """The twice-PyTorch rule over the pooled errors of calls that differ in their numbers only."""
    runs = [(c.run(backend), c.oracle(), c.plain(), c.terms()) for c in calls]
    for name in ("out", "dq", "dk", "dv"):
        for got, *_ in runs:
            assert got[name].dtype == calls[0].q.dtype, name
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
) -> AttentionCall:
    """A random call; queries, keys and values are parts of one projection where their shapes allow it."""

    def draw(*dims: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(*dims, dtype=torch.float64)).to(dtype)

    if S is None and H_kv is None:
        q, k, v = draw(B, T, 3, H, K, by=size).permute(2, 0, 3, 1, 4)
    else:
        q = draw(B, T, H, K, by=size).transpose(1, 2)
        k, v = draw(B, T if S is None else S, 2, H_kv or H, K, by=size).permute(2, 0, 3, 1, 4)
    dout = draw(B, T, H, K).transpose(1, 2)
    return AttentionCall(q, k, v, dout, None if lengths is None else torch.tensor(lengths))
