"""The renderer: exact in integers, never brighter than white, in the right place, smooth between pixels."""

from __future__ import annotations

import numpy as np
import pytest

from ditscale.dit.data import render
from ditscale.dit.data.render import EXTENTS, UNITS, _weights, backgrounds, paste


def one(canvas: np.ndarray, sprite: np.ndarray, extent: int, x: int, y: int) -> np.ndarray:
    """`sprite` uint8 [4, 32, 32] pasted alone."""
    arrays = [np.array([value], dtype=np.int64) for value in (0, extent, x, y)]
    paste(canvas, arrays[0], np.ascontiguousarray(sprite.transpose(1, 0, 2))[None], *arrays[1:])
    return canvas


def noise(seed: int) -> np.ndarray:
    """The worst sprite: every pixel fully on or off, so that the kernel overshoots as far as it can."""
    alpha = np.random.default_rng(seed).integers(0, 2, (1, 32, 32), dtype=np.uint8) * 255
    return np.repeat(alpha, 4, axis=0)


@pytest.mark.parametrize("size", [16, 32, 64])  # shrinks, both, enlarges
def test_float32_products_are_exact(size: int) -> None:
    """Same numbers in int64: were a partial sum above 2**24, another BLAS could round it otherwise."""
    table, first = _weights(32, size)
    assert np.array_equal(table, np.rint(table)) and len(table) == sum(UNITS - e + 1 for e in EXTENTS)
    weights = table.astype(np.int64)
    assert np.abs(weights).sum(axis=-1).max() * 255 * 16 * 1.25 < 2**24
    for seed, (extent, x, y) in enumerate([(32, 0, 96), (64, 13, 50), (120, 8, 0)]):
        sprite = noise(seed)
        down, across = (weights[first[EXTENTS.index(extent)] + place] for place in (y, x))
        rows = np.rint(np.einsum("yi,cij->cyj", down, sprite.astype(np.int64)) / 128).astype(np.int64)
        layer = np.einsum("xj,cyj->cyx", across, rows) / 32768
        layer = np.clip(layer, 0, 255).astype(np.float32)
        black = np.zeros((1, size, 3, size), dtype=np.float32)
        got = one(black, sprite, extent, x, y)[0].transpose(1, 0, 2)
        assert np.array_equal(got, np.minimum(layer[:3], layer[3:]))


@pytest.mark.parametrize("extent", [32, 44, 64, 120])
def test_never_outside_the_bytes(extent: int) -> None:
    """White noise on white stays white, black on black stays black; unclipped it wraps to dark dots."""
    white = np.full((1, 32, 3, 32), 255, dtype=np.float32)
    assert np.abs(one(white.copy(), noise(0), extent, 3, 5) - 255).max() < 0.01
    glass = noise(0) // 2  # black and white grains, half transparent: colour overshoots where alpha does not
    glass[3] = 127
    assert one(white.copy(), glass, extent, 3, 5).max() < 255.01
    sprite = noise(0)
    sprite[:3] = 0
    assert np.abs(one(np.zeros((1, 32, 3, 32), dtype=np.float32), sprite, extent, 3, 5)).max() == 0


def test_opaque_sprite_replaces_and_clear_sprite_leaves() -> None:
    ground = np.full((1, 32, 3, 32), 77, dtype=np.float32)
    solid = np.full((4, 32, 32), 255, dtype=np.uint8)
    solid[:3] = 200
    painted = one(ground.copy(), solid, 64, 32, 16)[0].transpose(1, 0, 2)  # pixels 8..23 and 4..19
    assert np.abs(painted[:, 7:17, 11:21] - 200).max() <= 1  # the kernel rings for two pixels from an edge
    outside = np.ones((32, 32), dtype=bool)
    outside[1:23, 5:27] = False
    assert (painted[:, outside] == 77).all()
    assert (one(ground.copy(), np.zeros((4, 32, 32), dtype=np.uint8), 64, 32, 16) == 77).all()


def test_place_moves_the_centre_by_units() -> None:
    """Half a pixel at 32 px is two units: the centre of mass must follow a sub-pixel step."""
    disc = ((np.indices((32, 32)) - 15.5) ** 2).sum(axis=0) < 15**2
    sprite = np.repeat((disc * 255).astype(np.uint8)[None], 4, axis=0)
    columns = np.arange(32) + 0.5
    for x in (20, 21, 22, 40):
        layer = one(np.zeros((1, 32, 3, 32), dtype=np.float32), sprite, 48, x, 30)[0, :, 0]
        centre = (layer.sum(axis=0) * columns).sum() / layer.sum()
        assert abs(centre - (x + 24) / 4) < 0.02


def test_every_target_gets_its_own_sprite_across_chunks() -> None:
    """More sprites than one chunk, target order unlike sprite order."""
    count = render._CHUNK * 2 + 5
    sprites = np.zeros((count, 32, 4, 32), dtype=np.uint8)
    sprites[:, :, 3] = 255
    sprites[:, :, 0] = np.arange(count)[:, None, None]
    target = np.random.default_rng(0).permutation(count)
    canvas = np.zeros((count, 32, 3, 32), dtype=np.float32)
    full = np.full(count, 64)
    paste(canvas, target, sprites, full, full // 2, full // 2)
    assert np.array_equal(np.rint(canvas[target, 16, 0, 16]), np.arange(count))


@pytest.mark.parametrize(
    ("direction", "first", "last"),
    [((1, 0), (5, 0), (5, -1)), ((0, -1), (-1, 5), (0, 5)), ((1, -1), (-1, 0), (0, -1))],
)
def test_gradient_runs_from_start_to_end(
    direction: tuple[int, int], first: tuple[int, int], last: tuple[int, int]
) -> None:
    start, end = np.array([[10, 20, 250]]), np.array([[200, 0, 250]])
    canvas = backgrounds(start, end, np.array([direction]), 16)[0].transpose(1, 0, 2)
    assert np.allclose(canvas[:, first[0], first[1]], start[0], atol=1e-3)
    assert np.allclose(canvas[:, last[0], last[1]], end[0], atol=1e-3)
    assert canvas.min() > -0.001 and canvas.max() < 255.001
