"""Draws a batch of sprites on canvases: cubic resampling at sub-pixel places and alpha compositing.

Every scene lives on a grid of 128 units a side, whatever the size in pixels: the same scene at 16 and at 64
px is the same picture at two resolutions. A sprite of `extent` units at place `p` is resampled by two small
matrix products, rows then columns.

Bit-equal everywhere: weights are integers (11 bits) and pixels are integers (8 bits, 12 between the
products), and every partial sum stays below 2**24, so that float32 products are exact in any order: the
largest is 255*16 * 1.25**2 * 2048 = 1.31e7, where 1.25 bounds the sum of absolute weights of the kernel. A
batch, a thread count or another BLAS cannot change a pixel.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

UNITS = 128
EXTENTS = tuple(range(32, UNITS - 4, 4))
_ONE = 2048
_CHUNK = 64


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Catmull-Rom kernel (Keys 1981 with a = -1/2): interpolates, support 2."""
    x = np.abs(x)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


@functools.lru_cache(maxsize=8)
def _weights(side: int, size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Integer weights [R, size, side] of every (extent, place), and the first row of each extent.

    Normalised over the endless lattice, not over the sprite: outside it is transparent, not repeated.
    """
    tables, first, rows = [], [], 0
    centres = (np.arange(size) + 0.5) * (UNITS / size)
    for extent in EXTENTS:
        places = np.arange(UNITS - extent + 1)
        stretch = max(1.0, (side * UNITS) / (extent * size))
        margin = int(2 * stretch) + 1
        source = np.arange(-margin, side + margin) + 0.5
        at = (centres[None, :] - places[:, None]) * (side / extent)
        inside = np.clip(at, 0, side)
        weight = _cubic((inside[..., None] - source) / stretch)
        total = weight.sum(axis=-1, keepdims=True)
        weight = _cubic((at[..., None] - source[margin:-margin]) / stretch) / total
        # The tiny offset decides exact halves the same way whatever the last bit of the sum.
        tables.append(np.floor(weight * _ONE + 0.5 + 1e-9).astype(np.float32))
        first.append(rows)
        rows += len(places)
    return np.concatenate(tables), np.asarray(first, dtype=np.int64)


def backgrounds(
    start: NDArray[np.int64], end: NDArray[np.int64], direction: NDArray[np.int64], size: int
) -> NDArray[np.float32]:
    """float32 [n, size, 3, size], values 0..255: linear gradients from colour `start` to `end`.

    start, end: int64 [n, 3]; direction: int64 [n, 2] (x, y), the way the gradient goes.
    """
    ramp = (2 * np.arange(size) + 1 - size).astype(np.float32)
    dx, dy = direction[:, :1].astype(np.float32), direction[:, 1:].astype(np.float32)
    reach = np.float32(2 * (size - 1)) * np.maximum(np.abs(dx) + np.abs(dy), 1)
    mix = np.float32(0.5) + (dy * ramp / reach)[:, :, None] + (dx * ramp / reach)[:, None, :]
    low, high = start.astype(np.float32), end.astype(np.float32)
    canvas: NDArray[np.float32] = low[:, None, :, None] + (high - low)[:, None, :, None] * mix[:, :, None, :]
    return canvas


def paste(
    canvas: NDArray[np.float32],
    target: NDArray[np.int64],
    sprites: NDArray[np.uint8],
    extent: NDArray[np.int64],
    x: NDArray[np.int64],
    y: NDArray[np.int64],
) -> None:
    """Lay sprite i over ``canvas[target[i]]``, in place; targets must differ from each other.

    canvas: float32 [n, size, 3, size].
    target: int64 [k], rows of `canvas`.
    sprites: uint8 [k, side, 4, side], premultiplied.
    extent: int64 [k], width and height in units, members of `EXTENTS`.
    x, y: int64 [k], left and top edge in units.
    """
    side, size = sprites.shape[1], canvas.shape[1]
    table, first = _weights(side, size)
    row = first[(extent - EXTENTS[0]) // (EXTENTS[1] - EXTENTS[0])]
    for at in range(0, len(target), _CHUNK):
        part = slice(at, at + _CHUNK)
        down, across = table[row[part] + y[part]], table[row[part] + x[part]]
        pixels = sprites[part].astype(np.float32)
        k = len(pixels)
        pixels = np.matmul(down, pixels.reshape(k, side, 4 * side))
        np.rint(pixels * np.float32(16 / _ONE), out=pixels)
        layer = np.matmul(pixels.reshape(k, size * 4, side), across.transpose(0, 2, 1)).reshape(k, size, 4, size)
        layer *= np.float32(1 / (16 * _ONE))
        np.clip(layer, 0, 255, out=layer)
        colour, alpha = layer[:, :, :3], layer[:, :, 3:]
        # The kernel overshoots: a colour above its alpha would be brighter than white once composited.
        np.minimum(colour, alpha, out=colour)
        canvas[target[part]] = canvas[target[part]] * (np.float32(1) - alpha * np.float32(1 / 255)) + colour
