"""Learning rates under muP, and the schedule's course."""

from __future__ import annotations

import pytest
import torch
from training_cases import tiny

from ditscale.dit import DiT, DiTConfig
from ditscale.dit.optim import Schedule, parameter_groups
from ditscale.errors import InputError


def model_of(width, **changes):
    settings = {"image_size": 8, "latent_factor": 1, "in_channels": 3, "depth": 1, "heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    return DiT(DiTConfig(width=width, **{**settings, **changes}))


def test_matrices_fed_by_the_width_learn_slower_as_it_grows():
    model = model_of(64, mup_base_width=16)
    hidden, fixed = parameter_groups(model, lr=0.4, weight_decay=0.1)
    assert hidden["lr"] == pytest.approx(0.1) and fixed["lr"] == 0.4
    assert hidden["weight_decay"] == 0.1 and fixed["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    hidden_names = {names[id(p)] for p in hidden["params"]}
    assert "blocks.0.attn.qkv.weight" in hidden_names and "final_layer.linear.weight" in hidden_names
    assert not hidden_names & {"x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight"}
    assert not any(name.endswith("bias") for name in hidden_names)
    assert len(hidden["params"]) + len(fixed["params"]) == len(names)


def test_without_a_base_width_there_is_one_rate():
    assert {group["lr"] for group in parameter_groups(model_of(64), lr=0.4)} == {0.4}


def first_update(width, base):
    """How far the output moves in one Adam step, per unit of learning rate, at a width."""
    model = model_of(width, mup_base_width=base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name or "final_layer.linear" in name:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
    x, t, y = torch.randn(8, 3, 8, 8), torch.rand(8) * 1000, torch.arange(8) % 3
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-3))
    before = model(x, t, y)
    before.square().mean().backward()
    optimizer.step()
    return float((model(x, t, y) - before).detach().square().mean().sqrt())


def test_coordinate_check():
    """One step moves the output alike at every width under muP, and further as it grows without (arXiv:2203.03466)."""
    mup, standard = ([first_update(width, base) for width in (32, 256)] for base in (32, None))
    # Eight times the width: the output's step may drift a little, and must grow far less than without muP.
    assert max(mup) / min(mup) < 4
    assert standard[1] / standard[0] > 2.5 * mup[1] / mup[0]


def test_shares_of_a_run_that_are_whole_steps_are_those():
    """Products of floats may lie beyond: 0.07 of 100 is 7.000000000000001."""
    for steps in (100, 2000):
        for part in range(steps + 1):
            plan = tiny(images=4 * steps, warmup_fraction=part / steps, decay_fraction=1 - part / steps)
            assert (plan.schedule.warmup, plan.schedule.decay) == (part, steps - part)
    plan = tiny(images=400, warmup_fraction=0.011, decay_fraction=0.5001)
    assert (plan.schedule.warmup, plan.schedule.decay) == (2, 51)


def test_the_schedule_rises_stays_and_falls():
    schedule = Schedule(steps=100, warmup=9, decay=40)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:9] == pytest.approx([(i + 1) / 10 for i in range(9)])
    assert set(factors[9:60]) == {1.0}
    assert all(a > b for a, b in zip(factors[59:], factors[60:], strict=False)) and 0 < factors[-1] < 0.03
    cosine = Schedule(steps=100, warmup=0, decay=100, shape="cosine")
    assert cosine.factor(50) == pytest.approx(0.5, abs=0.02)
    for wrong, what in (({"decay": 20}, "schedule"), ({"decay": 10, "shape": "step"}, "decay_shape")):
        with pytest.raises(InputError, match=what):
            Schedule(steps=100, warmup=90, **wrong)
