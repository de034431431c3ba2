"""Rectified flow: times, loss and samplers, on problems whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ditscale.dit.flow import RectifiedFlow, ValidationSet
from ditscale.dit.sampling import draw_samples
from ditscale.errors import InputError


class GaussianData(nn.Module):
    """The exact velocity for data drawn from N(mean, std^2) in every pixel, which needs no training.

    E[v | x_t] for jointly normal (x_0, eps): v = eps - x_0, x_t = (1 - t) x_0 + t eps.
    """

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, x, t, y=None, *, drop=None):
        t = (t / 1000).view(-1, 1, 1, 1)
        mean, std = self.mean, self.std
        if y is not None:
            shift = y.float().view(-1, 1, 1, 1)
            mean = mean + (shift if drop is None else torch.where(drop.view(-1, 1, 1, 1), 0.0, shift))
        variance = ((1 - t) * std) ** 2 + t**2
        slope = (t - (1 - t) * std**2) / variance
        return slope * (x - (1 - t) * mean) - mean


def test_times_are_logit_normal_and_stratified():
    flow = RectifiedFlow(time_mean=0.3, time_std=0.8)
    t = flow.sample_times(4096, torch.Generator().manual_seed(0)).double()
    z = (torch.logit(t) - 0.3) / 0.8
    assert abs(z.mean()) < 0.005 and abs(z.std() - 1) < 0.005
    # One time in each of the equally likely bins: far more even than independent draws.
    u = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    assert torch.equal((u * 4096).floor().sort().values.clamp(0, 4095), torch.arange(4096.0, dtype=torch.float64))


def test_validation_times_are_the_middles_of_equal_bins():
    t = RectifiedFlow().validation_times(8)
    assert torch.allclose(t, 1 - t.flip(0), atol=1e-6)
    expected = torch.sigmoid(torch.special.ndtri((torch.arange(8, dtype=torch.float64) + 0.5) / 8)).float()
    assert torch.equal(t, expected)


def test_loss_of_the_exact_model_is_the_conditional_variance():
    flow, model = RectifiedFlow(), GaussianData(0.2, 0.5)
    g = torch.Generator().manual_seed(0)
    x_0, eps = 0.2 + 0.5 * torch.randn(512, 3, 8, 8, generator=g), torch.randn(512, 3, 8, 8, generator=g)
    for t in (0.1, 0.5, 0.9):
        s = 0.5
        # Var(eps - x_0 | x_t) for this pair: (std / sqrt((1 - t)^2 std^2 + t^2))^2.
        exact = s**2 / ((1 - t) ** 2 * s**2 + t**2)
        loss = flow.loss(model, x_0, None, eps, torch.full((512,), t)).mean()
        assert abs(loss - exact) < 0.02 * exact


@pytest.mark.parametrize(("sampler", "order", "bound"), [("euler", 1, 0.05), ("heun", 2, 0.002)])
def test_samplers_converge_at_their_order(sampler, order, bound):
    model = GaussianData(0.4, 0.5)
    noise = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    # The flow of a normal distribution is linear: x_1 = mean + std * noise.
    exact = 0.4 + 0.5 * noise
    # Heun's last step is an Euler step, which costs it accuracy only at the very end, where the path is straight.
    errors = [(draw_samples(model, noise, steps=n, sampler=sampler) - exact).abs().max() for n in (20, 40)]
    assert errors[1] < bound and errors[0] / errors[1] > 0.8 * 2**order


def test_guidance_moves_along_the_condition():
    model = GaussianData(0.0, 0.5)
    noise, y = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 1.0])
    plain = draw_samples(model, noise, y, steps=50)
    double = draw_samples(model, noise, y, steps=50, guidance=2.0)
    assert torch.allclose(plain, torch.full_like(plain, 1.0), atol=0.01)
    # v_none + 2 (v_y - v_none) is linear in the mean here, so the samples land at twice the shift.
    assert torch.allclose(double, torch.full_like(double, 2.0), atol=0.02)


def test_samples_repeat_and_shift_changes_the_path_only():
    model, noise = GaussianData(0.1, 0.3), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(draw_samples(model, noise, steps=7), draw_samples(model, noise, steps=7))
    assert torch.allclose(
        draw_samples(model, noise, steps=80), draw_samples(model, noise, steps=80, shift=3.0), atol=5e-3
    )


def test_validation_loss_does_not_depend_on_the_batch():
    g = torch.Generator().manual_seed(0)
    data = ValidationSet(torch.randn(10, 1, 4, 4, generator=g), None, torch.tensor([0.2, 0.7]), seed=5)
    model, flow = GaussianData(0.0, 1.0), RectifiedFlow()
    whole, parts = data.loss(model, flow, batch=10), data.loss(model, flow, batch=3)
    assert whole == data.loss(model, flow, batch=10)
    assert whole == pytest.approx(parts, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"sampler": "rk4"}, "sampler"),
        ({"guidance": 2.0}, "guidance"),
        ({"shift": 0.0}, "shift"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(InputError, match=named):
        draw_samples(GaussianData(0, 1), torch.zeros(1, 1, 2, 2), **settings)


def test_a_clean_prediction_is_the_same_velocity():
    """A network that says x_0 gives, through x_0 = x_t - t v, the velocity and the samples of one that says v."""
    velocity = GaussianData(0.3, 0.5)

    class Clean(nn.Module):
        def forward(self, x, t, y=None, *, drop=None):
            return x - (t / 1000).view(-1, 1, 1, 1) * velocity(x, t, y, drop=drop)

    noise = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    flow = RectifiedFlow(prediction="clean")
    t = torch.tensor([0.06, 0.5, 1.0])
    assert torch.allclose(flow.velocity(Clean(), noise, t, None), velocity(noise, t * 1000), atol=1e-4)
    same = draw_samples(Clean(), noise, objective=flow, steps=10)
    assert torch.allclose(same, draw_samples(velocity, noise, steps=10), atol=1e-4)
    with pytest.raises(InputError, match="prediction"):
        RectifiedFlow(prediction="noise")
