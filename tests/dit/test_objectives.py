"""The objectives against closed forms: losses of the exact network, bounds restated, times, and how they are written."""

from __future__ import annotations

import math

import pytest
import torch
from exact_models import ExactDDPM, ExactEDM, ExactFlow, bits_of_divergence, linear_abar, normals
from torch import nn

from ditscale.dit import DiTConfig, TrainConfig
from ditscale.dit.diffusion import DDPM, EDM, grey_log_likelihood
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.objective import objective_from_dict
from ditscale.errors import InputError

MEAN, STD = 0.2, 0.4


def data(count=1024):
    shape = (count, 3, 6, 6)
    return MEAN + STD * normals(*shape, seed=1), normals(*shape, seed=2)


@pytest.mark.parametrize("t", [0, 7, 300, 999])
def test_ddpm_loss_of_the_exact_network_is_the_noise_s_conditional_variance(t):
    x_0, eps = data()
    loss = DDPM(learn_sigma=False).loss(ExactDDPM(MEAN, STD), x_0, None, eps, torch.full((len(x_0),), float(t)))
    abar = linear_abar()[t]
    exact = abar * STD**2 / (abar * STD**2 + 1 - abar)
    assert float(loss.mean()) == pytest.approx(float(exact), rel=0.02)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 5.0])
def test_edm_loss_of_the_exact_network_is_the_data_s_weighted_conditional_variance(sigma):
    x_0, eps = data()
    loss = EDM().loss(ExactEDM(MEAN, STD), x_0, None, eps, torch.full((len(x_0),), sigma))
    weight = (sigma**2 + 0.5**2) / (sigma * 0.5) ** 2
    assert float(loss.mean()) == pytest.approx(weight * STD**2 * sigma**2 / (STD**2 + sigma**2), rel=0.02)


def test_edm_preconditioning_gives_inputs_and_targets_of_unit_variance():
    """The network sees and must say numbers of order one at every level: that is what c_in, c_out and c_skip are for."""
    seen = []

    class Watched(nn.Module):
        def forward(self, x, t, y=None, *, drop=None):
            seen.append(float(x.std()))
            return torch.zeros_like(x)

    x_0, eps = 0.5 * normals(512, 3, 6, 6), normals(512, 3, 6, 6, seed=3)
    for sigma in (0.002, 0.5, 80.0):
        # Where F says nothing, the loss is the mean square of what it should have said.
        loss = EDM(sigma_data=0.5).loss(Watched(), x_0, None, eps, torch.full((512,), sigma))
        assert seen[-1] == pytest.approx(1, rel=0.02) and float(loss.mean()) == pytest.approx(1, rel=0.03)


def test_a_model_of_bfloat16_is_told_the_time_in_full():
    told = []

    class Watched(nn.Module):
        def forward(self, x, t, y=None, *, drop=None):
            told.append(t)
            return torch.zeros_like(x)

    x_0, eps, t = *(v.bfloat16() for v in data(1)), torch.tensor([997.0])
    DDPM(learn_sigma=False).loss(Watched(), x_0, None, eps, t)
    EDM().loss(Watched(), x_0, None, eps, (t / 250).exp())
    assert all(torch.allclose(time, t) for time in told)  # not 996


class Says(nn.Module):
    """Says a fixed noise, and a fixed place of the variance."""

    def __init__(self, eps, place):
        super().__init__()
        self.out = torch.cat([eps, place], 1)

    def forward(self, x, t, y=None, *, drop=None):
        return self.out


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_the_learned_variance_s_bound_is_the_divergence_from_the_posterior(t):
    x_0, eps = 0.3 * normals(4, 2, 3, 3, seed=5), normals(4, 2, 3, 3, seed=6)
    guess, place = eps + 0.1 * normals(4, 2, 3, 3, seed=7), 2 * torch.rand(4, 2, 3, 3) - 1
    times = torch.full((4,), float(t))
    loss = DDPM().loss(Says(guess, place), x_0, None, eps, times)
    plain = (guess - eps).square().mean((1, 2, 3))

    abar = linear_abar()
    now, before, beta = abar[t], abar[t - 1], 1 - abar[t] / abar[t - 1]
    x_0, eps, guess, place = (v.double() for v in (x_0, eps, guess, place))
    x_t = now.sqrt() * x_0 + (1 - now).sqrt() * eps

    def posterior(clean):
        return before.sqrt() * beta / (1 - now) * clean + (1 - beta).sqrt() * (1 - before) / (1 - now) * x_t

    small = beta * (1 - before) / (1 - now)
    share = (place + 1) / 2
    learned = torch.exp(share * beta.log() + (1 - share) * small.log())
    clean = (x_t - (1 - now).sqrt() * guess) / now.sqrt()
    bits = bits_of_divergence(posterior(x_0), small.expand_as(x_0), posterior(clean), learned).mean((1, 2, 3))
    assert torch.allclose(loss.double(), plain + bits, rtol=2e-4)


def test_the_bound_s_last_term_is_a_likelihood_of_grey_levels():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_variance = torch.tensor(0.31, dtype=torch.float64), torch.tensor(2 * math.log(0.2), dtype=torch.float64)
    probability = grey_log_likelihood(levels, mean.expand(256), log_variance.expand(256)).exp()
    assert float(probability.sum()) == pytest.approx(1, abs=1e-9)
    normal = torch.distributions.Normal(0.31, 0.2)
    inner = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    assert torch.allclose(probability[1:-1], inner[1:-1], rtol=1e-5)
    x_0, eps, place = levels.float()[:192].view(2, 2, 6, 8), normals(2, 2, 6, 8), torch.full((2, 2, 6, 8), -1.0)
    loss = DDPM().loss(Says(eps, place), x_0, None, eps, torch.zeros(2))
    abar = linear_abar()
    # The mean is right, the variance that of the second step's posterior, which stands in for the first's zero.
    variance = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])
    bits = -grey_log_likelihood(x_0.double(), x_0.double(), variance.log().expand_as(x_0)) / math.log(2)
    assert torch.allclose(loss.double(), bits.mean((1, 2, 3)), rtol=1e-3)


def test_the_mean_learns_nothing_from_the_bound():
    guess, place = normals(2, 2, 3, 3).requires_grad_(), torch.zeros(2, 2, 3, 3, requires_grad=True)
    x_0, eps = normals(2, 2, 3, 3, seed=1), normals(2, 2, 3, 3, seed=2)
    DDPM().loss(Says(guess, place), x_0, None, eps, torch.tensor([5.0, 900.0])).sum().backward()
    assert torch.allclose(guess.grad, 2 * (guess - eps).detach() / 18) and place.grad.abs().min() > 0


def test_times_follow_their_distributions():
    generator = torch.Generator().manual_seed(0)
    count = 4096
    uniform = RectifiedFlow(times="uniform").sample_times(count, generator)
    assert torch.equal((uniform.double() * count).floor().sort().values, torch.arange(count, dtype=torch.float64))
    moved = RectifiedFlow(times="uniform", shift=3.0).sample_times(count, generator)
    # P(t' <= x) = P(t <= x / (3 - 2 x)).
    for x in (0.2, 0.5, 0.9):
        assert float((moved <= x).float().mean()) == pytest.approx(x / (3 - 2 * x), abs=2 / count)
    steps = DDPM(timesteps=64).sample_times(count, generator)
    assert torch.equal(steps.sort().values, torch.arange(64.0).repeat_interleave(64))
    logs = EDM(log_mean=-0.4, log_std=1.1).sample_times(count, generator).double().log()
    assert float(logs.mean()) == pytest.approx(-0.4, abs=0.01) and float(logs.std()) == pytest.approx(1.1, abs=0.01)
    for objective in (RectifiedFlow(), DDPM(), EDM()):
        times = objective.validation_times(4)
        assert times.dtype is torch.float32 and bool((times.diff() > 0).all())


def test_cosine_schedule_is_nichol_and_dhariwal_s():
    abar = DDPM(schedule="cosine").chain.abar

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for t in (0, 10, 500, 900):
        assert float(abar[t]) == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert float(1 - abar[-1] / abar[-2]) == pytest.approx(0.999, rel=1e-9)


def test_shorter_chains_end_at_the_same_noise():
    for steps in (100, 1000):
        assert math.log(DDPM(timesteps=steps).chain.abar[-1]) == pytest.approx(math.log(4e-5), rel=0.1)


@pytest.mark.parametrize(
    "objective",
    [RectifiedFlow(prediction="clean", shift=2.0), DDPM(timesteps=50, schedule="cosine"), EDM(sigma_data=1.0)],
    ids=lambda o: o.name,
)
def test_objectives_are_written_and_read(objective):
    assert objective_from_dict(objective.to_dict()) == objective


def test_weights_of_before_there_were_names_are_rectified_flow():
    assert objective_from_dict({"time_mean": 0.0, "time_std": 1.0, "prediction": "clean"}) == RectifiedFlow(
        prediction="clean"
    )


MODEL = DiTConfig(image_size=16, latent_factor=1, in_channels=3, patch=4, width=8, depth=1, heads=1, num_classes=3)


def test_a_run_is_named_after_its_objective():
    def name(objective):
        return TrainConfig(model=MODEL, images=64, objective=objective).run_id

    ids = [name(o) for o in (None, DDPM(), EDM(), EDM(rho=5.0), RectifiedFlow(shift=3.0))]
    assert len(set(ids)) == 5
    config = TrainConfig(model=MODEL, images=64, objective=EDM(rho=5.0))
    assert TrainConfig.from_dict(config.to_dict()) == config
    table = {"model": MODEL, "images": 64, "objective": {"name": "edm", "rho": 5.0}}
    assert TrainConfig.from_dict(table) == config


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: objective_from_dict({"name": "vae"}), "objective.name"),
        (lambda: objective_from_dict({"name": "edm", "steps": 3}), "objective.steps"),
        (lambda: objective_from_dict({"name": ["ddpm"]}), "objective.name"),
        (lambda: DDPM(timesteps=1), "timesteps"),
        (lambda: DDPM(timesteps=10**15), "timesteps"),
        (
            lambda: DDPM().predict(Says(*data(1)[0].split([3, 0], 1)), data(1)[0], torch.ones(1), None),
            "learn_sigma: expected a model",
        ),
        (lambda: DDPM(schedule="square"), "schedule"),
        (lambda: DDPM(learn_sigma=1), "learn_sigma"),
        (lambda: EDM(sigma_data=0), "sigma_data"),
        (lambda: EDM(sigma_max=0.001), "sigma_max"),
        (lambda: RectifiedFlow(times="normal"), "times"),
        (lambda: RectifiedFlow(network="dit"), "network"),
        (lambda: RectifiedFlow(network="sit", prediction="clean"), "prediction"),
        (lambda: RectifiedFlow(time_std=0.0), "time_std"),
        (lambda: TrainConfig(model=MODEL, images=64, objective=DDPM(learn_sigma=False)), "learn_sigma"),
        (lambda: TrainConfig(model=MODEL, images=64, objective=EDM(), prediction="clean"), "prediction"),
        (lambda: TrainConfig(model=MODEL, images=64, objective="ddpm"), "objective: expected an objective such as"),
    ],
)
def test_bad_values_are_named(make, named):
    with pytest.raises(InputError, match=named):
        make()


def test_flow_loss_of_the_exact_network_is_the_conditional_variance():
    x_0, eps = data()
    for t in (0.1, 0.5, 0.9):
        # Var(eps - x_0 | x_t) for this pair: std^2 / ((1 - t)^2 std^2 + t^2).
        exact = STD**2 / ((1 - t) ** 2 * STD**2 + t**2)
        loss = RectifiedFlow().loss(ExactFlow(MEAN, STD), x_0, None, eps, torch.full((len(x_0),), t))
        assert float(loss.mean()) == pytest.approx(exact, rel=0.02)
