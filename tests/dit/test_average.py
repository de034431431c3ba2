"""Moving averages: their memory, their profiles against a direct sum, and those put together afterwards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ditscale.dit.average import (
    Profile,
    Snapshot,
    WeightAverage,
    power_exponent,
    power_profile,
    reconstruction,
    snapshot_steps,
)
from ditscale.errors import InputError


def tracked(profile, path):
    """The average of a path of weights, one row a step."""
    average = WeightAverage({"w": torch.zeros_like(path[0])}, profile)
    for step, weights in enumerate(path, 1):
        average.update([weights], step)
    return average.weights["w"]


def test_a_share_is_remembered():
    """Of weights that grow by one a step, an average over the last share of s steps lags by about share * s."""
    path = torch.arange(1.0, 2001.0)[:, None]
    lag = 2000 - float(tracked(Profile("share", 0.1), path))
    assert 0.8 * 0.1 / 1.1 * 2000 < lag < 1.2 * 0.1 / 1.1 * 2000


def test_a_fixed_decay_is_the_geometric_sum():
    path = torch.randn(50, 3)
    expected = sum(0.1 * 0.9 ** (49 - i) * path[i].double() for i in range(50))
    torch.testing.assert_close(tracked(Profile("fixed", 0.9), path).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.25])
def test_the_power_profile_has_its_width_and_is_what_training_gives(width):
    steps = np.arange(1, 4001)
    weights = power_profile(power_exponent(width), 4000, steps)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    mean = (weights * steps).sum()
    deviation = math.sqrt((weights * (steps - mean) ** 2).sum())
    assert deviation / 4000 == pytest.approx(width, rel=2e-3)  # the width is that of the continuous profile
    path = torch.randn(300, 2)
    expected = power_profile(power_exponent(width), 300, np.arange(1, 301)) @ path.double().numpy()
    np.testing.assert_allclose(tracked(Profile("power", width), path).double().numpy(), expected, rtol=1e-4, atol=1e-6)


def random_walk(steps):
    """Weights that drift and shake, as trained ones do."""
    generator = torch.Generator().manual_seed(3)
    shake = torch.randn(steps, 64, generator=generator)
    return torch.cumsum(0.05 * shake, 0) + torch.randn(steps, 64, generator=generator)


@pytest.mark.parametrize(("width", "step"), [(0.07, 4000), (0.12, 4000), (0.07, 3000), (0.2, 2600)])
def test_an_average_put_together_is_the_one_that_was_tracked(width, step):
    path = random_walk(4000)
    kept, averages = [], []
    for kept_width in (0.05, 0.1):
        average = WeightAverage({"w": torch.zeros(64)}, Profile("power", kept_width))
        for i, weights in enumerate(path, 1):
            average.update([weights], i)
            if i in snapshot_steps(4000, 16):
                kept.append(Snapshot(kept_width, i))
                averages.append(average.weights["w"].clone())
    coefficients = reconstruction(kept, Snapshot(width, step))
    assert coefficients.sum() == pytest.approx(1, abs=1e-9)
    made = sum(c * a.double() for c, a in zip(coefficients, averages, strict=True))
    direct = tracked(Profile("power", width), path[:step]).double()
    nearest = min((abs(k.width - width) + abs(k.step - step), i) for i, k in enumerate(kept))[1]
    error, without = (made - direct).norm() / direct.norm(), (averages[nearest] - direct).norm() / direct.norm()
    assert error < 0.01 and error < without / 10


def test_a_kept_average_is_found_again():
    kept = [Snapshot(0.05, 500), Snapshot(0.1, 500), Snapshot(0.05, 1000), Snapshot(0.1, 1000)]
    np.testing.assert_allclose(reconstruction(kept, kept[2]), [0, 0, 1, 0], atol=1e-8)


def test_what_cannot_be_is_named():
    with pytest.raises(InputError, match="ema_widths"):
        power_exponent(0.3)
    with pytest.raises(InputError, match="ema_share"):
        Profile("share", 0)
    with pytest.raises(InputError, match="ema_decay"):
        Profile("fixed", 1.0)
    with pytest.raises(InputError, match="ema: expected one of"):
        Profile("karras", 0.1)
    with pytest.raises(InputError, match="step: expected one up to"):
        reconstruction([Snapshot(0.05, 10)], Snapshot(0.05, 11))
    assert power_exponent(12**-0.5) == pytest.approx(0, abs=1e-6)
    assert snapshot_steps(7, 16) == [1, 2, 3, 4, 5, 6, 7]
