"""Rectified flow's times, and the fixed validation set."""

from __future__ import annotations

import pytest
import torch
from exact_models import ExactFlow, normals

from ditscale.dit.flow import RectifiedFlow, ValidationSet
from ditscale.errors import InputError


def test_times_are_logit_normal_and_stratified():
    flow = RectifiedFlow(time_mean=0.3, time_std=0.8)
    t = flow.sample_times(4096, torch.Generator().manual_seed(0)).double()
    z = (torch.logit(t) - 0.3) / 0.8
    assert abs(z.mean()) < 0.005 and abs(z.std() - 1) < 0.005
    # One time in each of the equally likely bins: far more even than independent draws.
    u = 0.5 * (1 + torch.erf(z / 2**0.5))
    assert torch.equal((u * 4096).floor().sort().values.clamp(0, 4095), torch.arange(4096.0, dtype=torch.float64))


def test_validation_times_are_the_middles_of_equal_bins():
    t = RectifiedFlow().validation_times(8)
    assert torch.allclose(t, 1 - t.flip(0), atol=1e-6)
    expected = torch.sigmoid(torch.special.ndtri((torch.arange(8, dtype=torch.float64) + 0.5) / 8)).float()
    assert torch.equal(t, expected)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 3, 5)], ids=["even", "odd"])
def test_validation_loss_does_not_depend_on_the_batch(shape):
    data = ValidationSet(normals(10, *shape), None, torch.tensor([0.2, 0.7]), seed=5)
    model, flow = ExactFlow(0.0, 1.0), RectifiedFlow()
    whole, parts = data.loss(model, flow, batch=10), data.loss(model, flow, batch=3)
    assert whole == data.loss(model, flow, batch=10)
    assert whole == pytest.approx(parts, rel=1e-6)


def test_an_unknown_prediction_is_named():
    with pytest.raises(InputError, match="prediction"):
        RectifiedFlow(prediction="noise")
