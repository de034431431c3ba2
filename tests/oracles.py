"""Float64 twins of the operators in numpy, with their gradients written out by hand: no code shared with the kernels.

``judge`` holds the rule that every kernel is judged by: its error against float64 is at most twice what plain PyTorch makes
at the same dtype, plus a floor of roundings of the largest value.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[np.float64]]


def wide(t: Tensor | None) -> Array | None:
    return None if t is None else t.detach().double().cpu().numpy()


def _rows(m: Array, B: int, T: int) -> Array:
    m = m[:, None, :] if m.ndim == 2 else m
    return np.broadcast_to(m, (B, T, m.shape[-1]))


def _fold(g: Array, like: Array) -> Array:
    """Sum a [B, T, D] gradient over what ``like`` was broadcast along."""
    if like.ndim == 1:
        return g.sum((0, 1))
    return g.sum(1) if like.ndim == 2 else g


@dataclass
class Adaln:
    """One call of the adaLN family: inputs and incoming gradients, as float64 arrays. ``branch`` None: no gated residual."""

    x: Array
    shift: Array
    scale: Array
    branch: Array | None = None
    gate: Array | None = None
    weight: Array | None = None
    bias: Array | None = None
    eps: float = 1e-6
    rms: bool = False
    dy: Array | None = None
    dx_new: Array | None = None
    out: dict[str, Array] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)  # largest term of a sum that may cancel

    def run(self) -> dict[str, Array]:
        B, T, D = self.x.shape
        o = self.out
        x = self.x
        if self.branch is not None and self.gate is not None:
            x = x + _rows(self.gate, B, T) * self.branch
            o["x_new"] = x
        mean = 0.0 if self.rms else x.mean(-1, keepdims=True)
        centred = x - mean
        rstd = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + self.eps)
        n = centred * rstd
        u = n if self.weight is None else n * self.weight
        u = u if self.bias is None else u + self.bias
        factor = 1 + _rows(self.scale, B, T)
        o["y"] = u * factor + _rows(self.shift, B, T)
        if self.dy is None:
            return o
        o["dshift"] = _fold(self.dy, self.shift)
        o["dscale"] = _fold(self.dy * u, self.scale)
        du = self.dy * factor
        if self.bias is not None:
            o["dbias"] = du.sum((0, 1))
        if self.weight is not None:
            o["dweight"] = (du * n).sum((0, 1))
            du = du * self.weight
        dx = du - n * (du * n).mean(-1, keepdims=True)
        if not self.rms:
            dx = dx - du.mean(-1, keepdims=True)
        dx = dx * rstd
        # The gradient of a norm is a difference; where it cancels (one column, rows of equal numbers) a rounding of its terms
        # is what any arithmetic at the dtype leaves.
        self.terms["dx"] = self.terms["dbranch"] = float(np.abs(du * rstd).max(initial=0.0))
        if self.dx_new is not None:
            dx = dx + self.dx_new
        o["dx"] = dx
        if self.branch is not None and self.gate is not None:
            o["dbranch"] = dx * _rows(self.gate, B, T)
            o["dgate"] = _fold(dx * self.branch, self.gate)
            self.terms["dbranch"] *= float(np.abs(self.gate).max(initial=0.0))
            self.terms["dgate"] = self.terms["dx"] * float(np.abs(self.branch).max(initial=0.0))
        return o


def gate_residual(x: Array, branch: Array, gate: Array, dout: Array) -> dict[str, Array]:
    B, T, _ = x.shape
    g = _rows(gate, B, T)
    return {"out": x + g * branch, "dx": dout, "dbranch": dout * g, "dgate": _fold(dout * branch, gate)}


def bias_gelu(x: Array, bias: Array, dy: Array) -> dict[str, Array]:
    z = x + bias
    u = np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)
    th = np.tanh(u)
    slope = 0.5 * (1 + th) + 0.5 * z * (1 - th**2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)
    dx = dy * slope
    return {"y": 0.5 * z * (1 + th), "dx": dx, "dbias": dx.reshape(-1, x.shape[-1]).sum(0)}


def errors(got: Tensor, exact: Array) -> tuple[float, float]:
    """Largest and root-mean-square absolute error."""
    if exact.size == 0:
        return 0.0, 0.0
    e = np.abs(got.detach().double().cpu().numpy() - exact)
    return float(e.max()), float(np.sqrt((e**2).mean()))


FLOOR_ULPS = 1.0


def judge(name: str, got: Tensor, exact: Array, plain: Tensor, terms: float = 0.0) -> None:
    """``judge_draws`` of a single draw."""
    judge_draws(name, [(got, exact, plain, terms)])


def judge_draws(name: str, draws: list[tuple[Tensor, Array, Tensor, float]]) -> None:
    """Fail unless the error of ``got`` is at most twice that of ``plain`` (largest and r.m.s.) plus a floor.

    A draw is (got, exact, plain, terms). Errors of several draws are pooled: with a handful of numbers PyTorch's error is a
    matter of luck. The floor is one rounding of the largest exact value at the dtype, or of ``terms``, the largest term of a
    difference that may cancel (two of them, in float32): where PyTorch happens to be exact, a right result must not fail.
    """
    mine, theirs, squares, floor, count = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 0.0, 0
    for got, exact, plain, terms in draws:
        assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {exact.shape}"
        assert torch.isfinite(got).all() or not np.isfinite(exact).all(), f"{name}: not finite"
        top = float(np.abs(exact).max(initial=0.0))
        floor = max(floor, FLOOR_ULPS * torch.finfo(got.dtype).eps * top + 2 * torch.finfo(torch.float32).eps * terms)
        count += exact.size
        for k, t in enumerate((got, plain)):
            largest, rms = errors(t, exact)
            side = mine if k == 0 else theirs
            side[0] = max(side[0], largest)
            squares[k] += rms**2 * exact.size
    mine[1], theirs[1] = (float(np.sqrt(s / max(count, 1))) for s in squares)
    for kind, a, b in zip(("largest", "r.m.s."), mine, theirs, strict=True):
        assert a <= 2 * b + floor, f"{name}: {kind} error {a:.3e}, plain PyTorch {b:.3e}, floor {floor:.1e}"
