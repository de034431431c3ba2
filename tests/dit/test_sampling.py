"""Samplers on Gaussian data, whose flow and whose ancestral chains are known exactly; guidance, churn, seeds."""

from __future__ import annotations

import pytest
import torch
from exact_models import ExactDDPM, ExactEDM, ExactFlow, linear_abar, normals
from model_variants import config_of, randomised
from torch import nn

from ditscale.dit.diffusion import DDPM, EDM
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.sampling import Churn, draw_samples, guided_share
from ditscale.errors import InputError

MEAN, STD = 0.4, 0.5
CASES = {
    "flow": (RectifiedFlow(), ExactFlow),
    "ddpm": (DDPM(), ExactDDPM),
    "edm": (EDM(), ExactEDM),
}
ABAR_T = float(linear_abar()[-1])
# Where each path begins: noise over signal.
START = {"flow": float("inf"), "ddpm": ((1 - ABAR_T) / ABAR_T) ** 0.5, "edm": 80.0}


def exact_flow_end(name, noise):
    """The probability flow of x_0 + sigma eps takes z to mean + (z - mean) std / sqrt(std^2 + sigma^2)."""
    sigma = START[name]
    if sigma == float("inf"):
        return MEAN + STD * noise
    return MEAN + (sigma * noise - MEAN) * STD / (STD**2 + sigma**2) ** 0.5


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_samplers_converge_at_their_order(name, sampler, order):
    objective, exact = CASES[name]
    noise = normals(4, 1, 2, 2)
    # Chains of whole steps: 999 / 37 = 27 and 999 / 111 = 9 apart, so that no rounding stands in the way.
    few, many = (38, 112) if name == "ddpm" else (40, 120)
    errors = [
        float((draw_samples(exact(MEAN, STD), noise, objective=objective, steps=n, sampler=sampler)
               - exact_flow_end(name, noise)).abs().max())
        for n in (few, many)
    ]  # fmt: skip
    # The grid of a chain of whole steps is uneven in sigma and its last step is Euler's: it gets no second order.
    wanted = 1 if name == "ddpm" else order
    assert errors[1] < 0.03 and errors[0] / errors[1] > 0.75 * 3**wanted


def test_ddim_without_noise_is_euler():
    for name, (objective, exact) in CASES.items():
        noise = normals(3, 2, 4, 4)
        euler, ddim = (
            draw_samples(exact(MEAN, STD), noise, objective=objective, steps=11, sampler=s) for s in ("euler", "ddim")
        )
        assert torch.allclose(euler, ddim, atol=2e-5), name


def chain_by_formulas(steps, place, start_mean, start_variance):
    """Mean and variance at the end of ancestral sampling by the released recipe: betas of a chain made shorter."""
    abar = linear_abar()
    kept = [round(i * 999 / (steps - 1)) for i in range(steps)]
    mean, variance = start_mean, start_variance
    for i in reversed(range(steps)):
        now = float(abar[kept[i]])
        before = float(abar[kept[i - 1]]) if i else 1.0
        beta = 1 - now / before
        # The exact network's guess of the data is affine in x.
        total = now * STD**2 + 1 - now
        slope, offset = STD**2 * now**0.5 / total, MEAN * (1 - now) / total
        weight, rest = before**0.5 * beta / (1 - now), (1 - beta) ** 0.5 * (1 - before) / (1 - now)
        small = beta * (1 - before) / (1 - now)
        added = small ** (1 - place) * beta**place if i else 0.0
        mean = weight * offset + (weight * slope + rest) * mean
        variance = (weight * slope + rest) ** 2 * variance + added
    return mean, variance**0.5


@pytest.mark.parametrize(("said", "place"), [(-1.0, 0.0), (0.0, 0.5), (1.0, 1.0)])
def test_ancestral_sampling_with_learned_variance_is_the_released_chain(said, place):
    noise = normals(256, 3, 8, 8)
    out = draw_samples(ExactDDPM(MEAN, STD, said), noise, objective=DDPM(), steps=20, sampler="ddpm", seed=3)
    mean, std = chain_by_formulas(20, place, 0.0, 1.0)
    # 49,152 pixels: their mean and deviation are known to half a percent.
    assert float(out.mean()) == pytest.approx(mean, abs=0.008) and float(out.std()) == pytest.approx(std, rel=0.012)
    others = [chain_by_formulas(20, other, 0.0, 1.0)[1] for other in (0.0, 0.5, 1.0) if other != place]
    assert all(abs(other / std - 1) > 0.02 for other in others), "the test would not tell the variances apart"


def test_ancestral_sampling_without_learned_variance_takes_the_posterior_s():
    noise = normals(256, 3, 8, 8)
    out = draw_samples(ExactDDPM(MEAN, STD), noise, objective=DDPM(learn_sigma=False), steps=20, sampler="ddpm")
    mean, std = chain_by_formulas(20, 0.0, 0.0, 1.0)
    assert float(out.mean()) == pytest.approx(mean, abs=0.008) and float(out.std()) == pytest.approx(std, rel=0.012)


def chain_on_the_path(levels, falls, eta):
    """Mean and deviation after DDIM with noise (DDPM: eta 1) on z = (1 - falls u) x_0 + u eps, for the exact network."""
    mean, variance = 0.0, float(levels[0]) ** 2
    for u, after in zip(levels[:-1].tolist(), levels[1:].tolist(), strict=True):
        a, b = 1 - falls * u, 1 - falls * after
        slope, offset = STD**2 * a / (a**2 * STD**2 + u**2), MEAN * u**2 / (a**2 * STD**2 + u**2)
        # q(z' | z, x_0) of a Gaussian path, Song et al., equation 16 with sigma^2 in place of 1 - alpha.
        added = eta**2 * (u**2 - (a / b * after) ** 2) * after**2 / u**2
        noise = (after**2 - added) ** 0.5
        # z' = b clean + noise eps + fresh, clean = offset + slope z, eps = (z - a clean) / u.
        keep = b * slope + noise * (1 - a * slope) / u
        mean = (b - noise * a / u) * offset + keep * mean
        variance = keep**2 * variance + added
    return mean, variance**0.5


@pytest.mark.parametrize(("name", "falls"), [("flow", 1), ("edm", 0)])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_noisy_ddim_s_distribution_is_the_chain_s(name, falls, eta):
    objective, exact = CASES[name]
    settings = {"sampler": "ddim", "eta": eta} if eta < 1 else {"sampler": "ddpm"}
    out = draw_samples(exact(MEAN, STD), normals(256, 3, 8, 8), objective=objective, steps=12, seed=3, **settings)
    mean, std = chain_on_the_path(objective.levels(12).double(), falls, eta)
    assert float(out.mean()) == pytest.approx(mean, abs=0.008) and float(out.std()) == pytest.approx(std, rel=0.012)
    assert abs(chain_on_the_path(objective.levels(12).double(), falls, 0.0)[1] / std - 1) > 0.015


@pytest.mark.parametrize("most", [50.0, float("inf")])
@pytest.mark.parametrize("name", CASES)
def test_churn_adds_what_it_takes_away(name, most):
    objective, exact = CASES[name]
    noise = normals(64, 1, 16, 16, seed=2)
    settings = {"objective": objective, "steps": 100, "churn": Churn(30, most=most, noise=1.0)}
    out = draw_samples(exact(MEAN, STD), noise, seed=1, **settings)
    assert float(out.mean()) == pytest.approx(MEAN, abs=0.015) and float(out.std()) == pytest.approx(STD, rel=0.015)


@pytest.mark.parametrize("settings", [{"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.6}, {"churn": Churn(20)}])
def test_stochastic_samplers_repeat_by_their_seed(settings):
    def draw(seed):
        noise = normals(8, 1, 4, 4, seed=2)
        return draw_samples(ExactEDM(MEAN, STD), noise, objective=EDM(), steps=9, seed=seed, **settings)

    assert torch.equal(draw(1), draw(1)) and not torch.allclose(draw(1), draw(2), atol=0.01)


def test_a_sample_with_a_seed_of_its_own_is_the_same_beside_any_others():
    noise, seeds = normals(5, 1, 4, 4, seed=2), [3, 1, 4, 1, 5]
    settings = {"steps": 9, "sampler": "ddpm"}
    whole = draw_samples(ExactFlow(MEAN, STD), noise, seed=seeds, **settings)
    for rows in (slice(0, 2), slice(2, 5), slice(4, 5)):
        part = draw_samples(ExactFlow(MEAN, STD), noise[rows], seed=seeds[rows], **settings)
        assert torch.allclose(part, whole[rows], atol=1e-6)
    with pytest.raises(InputError, match="seed: expected one, or one for each of 5 samples, got 4"):
        draw_samples(ExactFlow(MEAN, STD), noise, seed=seeds[:4], **settings)
    with pytest.raises(InputError, match="seed: expected a whole number of 64 bits, got 0.5"):
        draw_samples(ExactFlow(MEAN, STD), noise, seed=[1, 2, 3, 4, 0.5], **settings)


@pytest.mark.parametrize("seed", [0, 7])
def test_added_noise_is_independent_of_starting_noise_drawn_with_the_same_seed(seed):
    noise = normals(256, 3, 8, 8, seed=seed)
    settings = {"steps": 12, "sampler": "ddim", "eta": 0.5, "seed": seed}
    out = draw_samples(ExactFlow(MEAN, STD), noise, **settings)
    mean, std = chain_on_the_path(RectifiedFlow().levels(12).double(), 1, 0.5)
    assert float(out.mean()) == pytest.approx(mean, abs=0.008) and float(out.std()) == pytest.approx(std, rel=0.012)


def test_full_ddim_noise_is_the_ancestral_step():
    for objective, model in ((RectifiedFlow(), ExactFlow(MEAN, STD)), (EDM(), ExactEDM(MEAN, STD))):
        noise = normals(2, 1, 4, 4)
        ddim = draw_samples(model, noise, objective=objective, steps=9, sampler="ddim", eta=1.0, seed=5)
        ddpm = draw_samples(model, noise, objective=objective, steps=9, sampler="ddpm", seed=5)
        assert torch.allclose(ddim, ddpm, atol=1e-6)


def test_edm_levels_are_the_paper_s():
    levels = EDM().levels(18)
    assert len(levels) == 19 and float(levels[0]) == pytest.approx(80) and float(levels[-1]) == 0
    a, b = 80 ** (1 / 7), 0.002 ** (1 / 7)
    assert float(levels[5]) == pytest.approx((a + 5 / 17 * (b - a)) ** 7) and float(levels[17]) == pytest.approx(0.002)


def test_edm_heun_is_algorithm_1():
    model, noise, sigma = ExactEDM(MEAN, STD), normals(2, 1, 2, 2).double(), EDM().levels(6)

    def slope(x, s):
        clean = (MEAN * s**2 + STD**2 * x) / (STD**2 + s**2)
        return (x - clean) / s

    x = noise * sigma[0]
    for i in range(6):
        d = slope(x, sigma[i])
        ahead = x + (sigma[i + 1] - sigma[i]) * d
        if sigma[i + 1] > 0:
            ahead = x + (sigma[i + 1] - sigma[i]) * (d + slope(ahead, sigma[i + 1])) / 2
        x = ahead
    assert torch.allclose(
        draw_samples(model, noise.float(), objective=EDM(), steps=6).double(), x, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", CASES)
def test_guidance_moves_along_the_condition(name):
    objective, exact = CASES[name]
    noise, y = torch.zeros(2, 1, 2, 2), torch.tensor([1.0, 1.0])
    plain = draw_samples(exact(0.0, 0.5), noise, y, objective=objective, steps=50)
    double = draw_samples(exact(0.0, 0.5), noise, y, objective=objective, steps=50, guidance=2.0)
    # s_none + 2 (s_y - s_none) is linear in the mean here, so the samples land at twice the shift.
    assert torch.allclose(plain, torch.ones_like(plain), atol=0.02)
    assert torch.allclose(double, torch.full_like(double, 2.0), atol=0.04)


def test_guidance_within_its_interval_only():
    model, noise, y = ExactFlow(0.0, 0.5), normals(3, 1, 2, 2), torch.tensor([1.0, 2.0, 0.5])
    steps, guidance = 10, 3.0
    out = draw_samples(model, noise, y, steps=steps, sampler="euler", guidance=guidance, guidance_interval=(0.35, 0.75))
    # Times 1, 0.9, ... 0.1; 0.7 to 0.4 lie in the interval and are asked for twice at once.
    assert model.rows == [3, 3, 3, 6, 6, 6, 6, 3, 3, 3]
    x = noise.clone()
    for i in range(steps):
        t = torch.full((3,), 1 - i / steps)
        v = model(x, 1000 * t, y)
        if 3 <= i <= 6:
            none = model(x, 1000 * t, y, drop=torch.ones(3, dtype=torch.bool))
            v = none + guidance * (v - none)
        x = x - v / steps
    assert torch.allclose(out, x, atol=1e-5)
    never = draw_samples(model, noise, y, steps=steps, guidance=guidance, guidance_interval=(0.0, 0.0))
    assert torch.equal(never, draw_samples(model, noise, y, steps=steps))


@pytest.mark.parametrize("steps", [10, 25])
def test_the_ends_of_the_guidance_interval_are_in_it(steps):
    """A level of float32 is seldom the number of float64 that names it."""
    for k in range(1, steps + 1):
        for interval, wanted in (((0.0, k / steps), k), ((k / steps, 1.0), steps - k + 1)):
            settings = {"steps": steps, "sampler": "euler", "guidance_interval": interval}
            assert guided_share(RectifiedFlow(), **settings) == wanted / steps
            model = ExactFlow(0.0, 0.5)
            draw_samples(model, torch.zeros(1, 1, 1, 1), torch.ones(1), guidance=2.0, **settings)
            assert model.rows.count(2) == wanted


def test_guided_channels_leave_the_others_as_they_are():
    model, noise, y = ExactFlow(0.0, 0.5), normals(2, 4, 2, 2), torch.tensor([1.0, 1.0])
    some = draw_samples(model, noise, y, steps=8, guidance=2.0, guided_channels=3)
    assert torch.allclose(some[:, :3], draw_samples(model, noise, y, steps=8, guidance=2.0)[:, :3])
    assert torch.allclose(some[:, 3:], draw_samples(model, noise, y, steps=8)[:, 3:], atol=1e-6)


def test_conditions_of_several_parts_are_doubled_part_by_part():
    class Pair(ExactFlow):
        def forward(self, x, t, y=None, *, drop=None):
            assert len(y[0]) == len(y[1]) == len(x)
            return super().forward(x, t, y[0] + y[1], drop=drop)

    noise = normals(2, 1, 2, 2)
    parts = torch.tensor([0.5, 0.25]), torch.tensor([0.5, 0.75])
    whole = draw_samples(ExactFlow(0, 0.5), noise, sum(parts), steps=4, guidance=2.0)
    assert torch.equal(draw_samples(Pair(0, 0.5), noise, parts, steps=4, guidance=2.0), whole)


def test_samples_repeat_and_shift_changes_the_path_only():
    model, noise = ExactFlow(0.1, 0.3), normals(2, 1, 4, 4, seed=3)
    assert torch.equal(draw_samples(model, noise, steps=7), draw_samples(model, noise, steps=7))
    plain = draw_samples(model, noise, steps=80)
    assert torch.allclose(plain, draw_samples(model, noise, steps=80, shift=3.0), atol=5e-3)
    assert not torch.equal(plain, draw_samples(model, noise, steps=80, shift=3.0))


def test_churn_of_nothing_is_nothing():
    for objective, model in ((RectifiedFlow(), ExactFlow(MEAN, STD)), (EDM(), ExactEDM(MEAN, STD))):
        noise = normals(2, 1, 4, 4)
        none = draw_samples(model, noise, objective=objective, steps=9)
        assert torch.allclose(none, draw_samples(model, noise, objective=objective, steps=9, churn=Churn(0)), atol=2e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "ddpm"])
def test_clipped_samples_end_within_their_bounds(name, sampler):
    objective, exact = CASES[name]
    settings = {"objective": objective, "steps": 20, "sampler": sampler}
    noise, model = normals(4, 1, 8, 8), exact(0.0, 1.0)
    free = draw_samples(model, noise, **settings)
    clipped = draw_samples(model, noise, clip=0.5, **settings)
    # The last step ends at the estimate itself.
    assert float(free.abs().max()) > 1.5 and float(clipped.abs().max()) <= 0.5 + 1e-5
    assert torch.allclose(draw_samples(model, noise, clip=100.0, **settings), free, atol=1e-3)


def test_training_mode_is_as_it_was():
    class Noticed(ExactFlow):
        def forward(self, *args, **kwargs):
            assert not self.training
            return super().forward(*args, **kwargs)

    model = Noticed(0, 1)
    draw_samples(model, torch.zeros(1, 1, 2, 2), steps=2)
    assert model.training


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 10**26}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": 1e308}, "guidance"),
        ({"guided_channels": 0}, "guided_channels"),
        ({"guided_channels": 2}, "guided_channels"),
        ({"clip": 1e308}, "clip"),
        ({"seed": 2**70}, "seed"),
        ({"sampler": "rk4"}, "sampler"),
        ({"guidance": 2.0}, "guidance"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"shift": 0.0}, "shift"),
        ({"clip": 0.0}, "clip"),
        ({"eta": 0.5}, "eta"),
        ({"sampler": "ddim", "eta": 1.5}, "eta"),
        ({"sampler": "ddpm", "churn": Churn()}, "churn"),
        ({"guidance_interval": None}, "guidance_interval"),
        ({"guidance_interval": (0.5,)}, "guidance_interval"),
        ({"guided_channels": 1.0}, "guided_channels"),
        ({"seed": "a"}, "seed"),
        ({"sampler": "ddim", "eta": "a"}, "eta"),
        ({"noise": torch.zeros(0, 1, 2, 2)}, "noise"),
        ({"objective": DDPM(), "steps": 1001}, "steps"),
        ({"objective": DDPM(), "shift": 2.0}, "shift"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(InputError, match=named):
        draw_samples(nn.Identity(), **{"noise": torch.zeros(1, 1, 2, 2)} | settings)


@pytest.mark.parametrize("most", ["x", 0.01, float("nan"), True])
def test_churn_up_to_no_number_is_named(most):
    assert Churn(most=float("inf")).most == float("inf")
    with pytest.raises(InputError, match="churn.most"):
        Churn(most=most)


@pytest.mark.parametrize(("timesteps", "steps"), [(1000, 25), (10, 10)])
def test_steps_are_25_or_those_of_a_shorter_chain(timesteps, steps):
    model, seen = ExactDDPM(MEAN, STD), []
    objective = DDPM(timesteps=timesteps, learn_sigma=False)
    draw_samples(model, normals(1, 1, 2, 2), objective=objective, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (steps, steps)


def test_a_model_that_takes_the_guidance_is_told_it():
    """A distilled model is asked once, and told 1 outside the interval."""
    model = randomised(config_of("adaln-zero", guidance_embed=True))
    told = []
    model.guidance_embedder.register_forward_hook(lambda _, given, __: told.append((given[0] / 1000).tolist()))
    noise, y = normals(2, *model.config.input_shape), torch.tensor([0, 1])
    settings = {"steps": 4, "sampler": "euler", "guidance_interval": (0.4, 0.8)}
    out = draw_samples(model, noise, y, guidance=4.0, **settings)
    assert told == [[1, 1], [4, 4], [4, 4], [1, 1]]
    assert not torch.allclose(out, draw_samples(model, noise, y, **settings), atol=1e-3)
    with pytest.raises(InputError, match="guided_channels"):
        draw_samples(model, noise, y, guidance=4.0, guided_channels=1)


def test_a_model_of_half_precision_draws_near_its_float32_self():
    model = randomised(config_of("adaln-zero"))
    noise, y = normals(2, *model.config.input_shape), torch.tensor([0, 1])
    exact = draw_samples(model, noise, y, steps=3, guidance=2.0)
    near = draw_samples(model.bfloat16(), noise, y, steps=3, guidance=2.0)
    assert near.dtype is torch.float32 and float((near - exact).abs().max() / exact.abs().max()) < 0.1


def test_a_clean_prediction_is_the_same_velocity():
    """A network that says x_0 gives, through x_0 = x_t - t v, the velocity and the samples of one that says v."""
    velocity = ExactFlow(0.3, 0.5)

    class Clean(nn.Module):
        def forward(self, x, t, y=None, *, drop=None):
            return x - (t / 1000).view(-1, 1, 1, 1) * velocity(x, t, y, drop=drop)

    noise = normals(3, 1, 4, 4)
    flow = RectifiedFlow(prediction="clean")
    t = torch.tensor([0.06, 0.5, 1.0])
    assert torch.allclose(flow.velocity(Clean(), noise, t, None), velocity(noise, t * 1000), atol=1e-4)
    same = draw_samples(Clean(), noise, objective=flow, steps=10)
    assert torch.allclose(same, draw_samples(velocity, noise, steps=10), atol=1e-4)
