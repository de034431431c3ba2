"""From a number of parameters to a DiT that exists: whole layers, whole heads, counted by the exact ledger."""

from __future__ import annotations

import math
from typing import Any

from ditscale.dit.config import DiTConfig
from ditscale.dit.flops import count, count_params
from ditscale.errors import InputError
from ditscale.scaling.checks import need_positive, need_whole

PARAM_KINDS = ("per_token", "total")
# Width over depth of Liang et al. (arXiv:2410.08184), and a head's width, where nothing else is asked for.
ASPECT, HEAD_WIDTH = 64.0, 64
_MAX_DEPTH = 256
_LEAST_ASPECT, _MOST_ASPECT = 0.01, 10_000
# How far the ratio of width to depth may leave the rule for a closer parameter count, and what that costs: a
# tenth of a relative error in the ratio weighs as much as a hundredth in the parameters.
_ASPECT_SLACK = 1.5
_ASPECT_WEIGHT = 0.1


def design_config(
    params: float,
    *,
    template: DiTConfig | None = None,
    params_kind: str = "per_token",
    aspect: float = ASPECT,
    head_width: int = HEAD_WIDTH,
) -> DiTConfig:
    """The DiT nearest to a parameter count under a depth-to-width rule.

    Args:
        params: target number of parameters.
        template: every field but width, depth and heads. Default: a DiT/2 on 256-pixel latents.
        params_kind: which parameters are meant: "per_token" (those that work on every token: what 6ND counts)
            or "total" (with adaLN modulation, time layers and embeddings).
        aspect: width over depth. Default: 64.
        head_width: of every head; the width is a multiple of it. Default: 64.

    Raises:
        InputError: a value that is not positive, an unknown kind, or a target that no such DiT reaches.
    """
    if params_kind not in PARAM_KINDS:
        raise InputError(f"params-kind: expected per_token or total, got {params_kind!r}")
    need_positive("params", params)
    if not _LEAST_ASPECT <= need_positive("aspect", aspect) <= _MOST_ASPECT:
        raise InputError(f"aspect: expected {_LEAST_ASPECT:g} to {_MOST_ASPECT:,}, got {aspect!r}")
    if need_whole("head-width", head_width, 4) % 4:
        raise InputError(f"head-width: expected a positive multiple of 4, got {head_width!r}")
    base = template or DiTConfig()
    best: tuple[float, DiTConfig] | None = None
    # 12 L D^2 parameters in the blocks: the depth that the rule gives, and its neighbours.
    guess = (params / (12.0 * aspect**2)) ** (1.0 / 3.0)
    depths = range(max(1, math.floor(guess / 1.6)), min(_MAX_DEPTH, math.ceil(guess * 1.6) + 2) + 1)
    for depth in depths:
        for heads in range(1, max(2, math.ceil(_ASPECT_SLACK * aspect * depth / head_width)) + 1):
            width = heads * head_width
            off = abs(math.log(width / (depth * aspect)))
            if off > math.log(_ASPECT_SLACK) and not (heads == 1 or depth == 1):
                continue
            config = base.replace(width=width, depth=depth, heads=heads, name="")
            miss = abs(math.log(counted(config, params_kind) / params))
            score = miss + _ASPECT_WEIGHT * off
            if best is None or score < best[0]:
                best = (score, config)
    if best is None or abs(math.log(counted(best[1], params_kind) / params)) > math.log(1.5):
        raise InputError(
            f"params: expected a size that some DiT with heads of {head_width} and width/depth near {aspect:g} has, "
            f"got {params:.4g}; change --head-width or --aspect"
        )
    return best[1]


def counted(config: DiTConfig, params_kind: str) -> int:
    """Parameters of a configuration by kind."""
    p = count_params(config)
    return p.per_token if params_kind == "per_token" else p.total


def describe(config: DiTConfig, budget: float, batch: int | None) -> dict[str, Any]:
    """What training a configuration on a budget comes to: images, tokens, steps, by the exact ledger."""
    report = count(config)
    images = int(budget // report.train)
    if images < 1:
        raise InputError(f"budget: expected enough for one image ({report.train:.4g} FLOPs), got {budget:.4g}")
    steps = images // batch if batch else None
    return {
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "patch": config.patch,
        "image_size": config.image_size,
        "latent_factor": config.latent_factor,
        "model": config.to_dict(),
        "params": report.params.total,
        "params_per_token": report.params.per_token,
        "params_per_sample": report.params.per_sample,
        "tokens_per_image": report.tokens,
        "train_flops_per_image": report.train,
        "flop_convention": report.convention,
        "images": images,
        "tokens": images * report.tokens,
        "batch": batch,
        "steps": steps,
    }
