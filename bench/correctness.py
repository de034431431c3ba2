"""Correctness before timing: a candidate is judged against float64, beside what plain PyTorch makes at the same dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Where plain PyTorch happens to be exact a right result must not fail: roundings of the largest exact value.
FLOOR_ULPS = 2.0
FACTOR = 2.0
# Other libraries trade accuracy as they like: they are timed unless they give another thing, and their error stands in the row.
PEER_FACTOR = 64.0


@dataclass(frozen=True)
class Verdict:
    """What the check found.

    Attributes:
        reason: None where the candidate passed, else what is wrong, in one line.
        error: largest error of any result, relative to that result's largest exact value.
        plain_error: the same of plain PyTorch.
    """

    reason: str | None
    error: float
    plain_error: float


def judge(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Mapping[str, Tensor], factor: float = FACTOR
) -> Verdict:
    """Compare results by name: largest and root-mean-square error at most ``factor`` times those of ``plain``, plus a floor.

    Args:
        got: the candidate's outputs and gradients.
        exact: the same in float64.
        plain: the same from plain PyTorch at the candidate's dtype.
        factor: how much less exact the candidate may be. Default: 2, which is what our kernels are held to.
    """
    if set(got) != set(exact):
        return Verdict(f"gave {sorted(got)}, expected {sorted(exact)}", float("inf"), 0.0)
    worst = worst_plain = 0.0
    reason = None
    for name, truth in exact.items():
        if got[name].shape != truth.shape:
            return Verdict(f"{name}: shape {list(got[name].shape)}, expected {list(truth.shape)}", float("inf"), 0.0)
        top = float(truth.abs().max()) if truth.numel() else 0.0
        floor = factor * FLOOR_ULPS / FACTOR * torch.finfo(got[name].dtype).eps * top
        mine, theirs = _errors(got[name], truth), _errors(plain[name], truth)
        for kind, a, b in zip(("largest", "r.m.s."), mine, theirs, strict=True):
            if not a <= factor * b + floor and reason is None:  # "not <=" lets no NaN through
                reason = f"{name}: {kind} error {a:.2e} against float64, plain PyTorch {b:.2e}"
        if top:
            worst, worst_plain = max(worst, mine[0] / top), max(worst_plain, theirs[0] / top)
    return Verdict(reason, worst, worst_plain)


def _errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    if exact.numel() == 0:
        return 0.0, 0.0
    error = (got.detach().double() - exact).abs()
    return float(error.max()), float(error.square().mean().sqrt())
