"""Cosines and sines for rotary position embedding on one, two or three axes: of images, of video, beside text."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ditscale.errors import InputError


def _axis_widths(K: int, axes: int, widths: Sequence[int] | None) -> tuple[int, ...]:
    if K < 2 or K % 2:
        raise InputError(f"K: expected an even head width, got {K}")
    if widths is None:
        # As even as even widths allow; what is left over goes to the last axes, the spatial ones.
        pairs, extra = divmod(K // 2, axes)
        if not pairs:  # an axis would not be turned
            raise InputError(f"K: expected a head width of at least {2 * axes} for {axes} axes, or widths, got {K}")
        return tuple(2 * (pairs + (i >= axes - extra)) for i in range(axes))
    if len(widths) != axes or any(w < 0 or w % 2 for w in widths) or sum(widths) != K:
        raise InputError(f"widths: expected {axes} even numbers that add up to K = {K}, got {list(widths)}")
    return tuple(widths)


def rotary_table(
    sizes: Sequence[int],
    K: int,
    *,
    text_tokens: int = 0,
    theta: float = 10_000.0,
    widths: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """The tables ``cos`` and ``sin`` of ``qk_norm_rope`` for a grid of tokens, the last axis fastest.

    Axis ``a`` with ``w`` numbers of the head's width turns its w / 2 pairs by ``position * theta ** (-2 i / w)``.

    Args:
        sizes: tokens along each axis: (T,), (height, width) or (frames, height, width).
        K: head width, even; without ``widths`` at least 2 for each axis.
        text_tokens: tokens in front that are not turned (cosine 1, sine 0), as in joint sequences. Default: 0.
        theta: the longest wavelength over 2 pi, in tokens. Default: 10,000.
        widths: numbers of the head's width that belong to each axis, even, K in all. Default: as even as they can be, the
            remainder to the last axes (K = 72 on three axes: 24, 24, 24; K = 64: 20, 22, 22).
        scales: factor of the positions of each axis, below 1 to interpolate to larger grids. Default: 1.
        device: where the tables are made. Default: the CPU.

    Returns:
        (cos, sin), each [text_tokens + tokens, K / 2], float32. Angles are computed in float64.

    Raises:
        InputError: a size, width or scale is not as above.

    Source: RoPE arXiv:2104.09864, section 3.2; on two axes arXiv:2403.13298.
    """
    axes = len(sizes)
    if axes not in (1, 2, 3) or any(n < 1 for n in sizes):
        raise InputError(f"sizes: expected one to three positive sizes, got {list(sizes)}")
    if text_tokens < 0:
        raise InputError(f"text_tokens: expected 0 or more, got {text_tokens}")
    if scales is not None and (len(scales) != axes or not all(-math.inf < s < math.inf for s in scales)):
        raise InputError(f"scales: expected {axes} finite factors, one an axis, got {list(scales)}")
    if not 0 < theta < math.inf:
        raise InputError(f"theta: expected a positive, finite number, got {theta}")
    per_axis = _axis_widths(K, axes, widths)
    columns = []
    for axis, (size, width) in enumerate(zip(sizes, per_axis, strict=True)):
        if width == 0:
            continue
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        positions = torch.arange(size, dtype=torch.float64, device=device) * (1.0 if scales is None else scales[axis])
        shape = [1] * axes + [width // 2]
        shape[axis] = size
        columns.append(torch.outer(positions, frequencies).view(shape).expand(*sizes, width // 2))
    angles = torch.cat(columns, dim=-1).reshape(-1, K // 2)
    if text_tokens:
        angles = torch.cat((angles.new_zeros(text_tokens, K // 2), angles))
    return angles.cos().float(), angles.sin().float()
