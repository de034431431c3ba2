"""The mixture of experts against a loop over tokens: who goes where, the balance loss, capacity, gradients, determinism."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_variants import TINY, config_of, inputs_of, randomised
from restated_dit import Restated

from ditscale.dit import DiTConfig
from ditscale.dit.moe import Mixture

MIXTURES = ["mixture", "mixture, one expert each, shared", "mixture with room", "mixture without room"]


@pytest.mark.parametrize("name", MIXTURES)
def test_the_balance_loss_and_its_gradient_are_the_papers(name):
    config = config_of(name)
    model, (x, t, y) = randomised(config), inputs_of(config)
    weights = {key: value.detach().double() for key, value in model.state_dict().items()}
    routers = [key for key in weights if "router" in key]
    for key in routers:
        weights[key].requires_grad_()
    restated = Restated(weights, config)
    restated(x, t, y)
    exact = sum(restated.balances) / len(restated.balances)
    model(x, t, y)
    assert float(model.balance_loss.detach()) == pytest.approx(float(exact.detach()), rel=1e-6)
    model.balance_loss.backward()
    exact.backward()
    for key in routers:
        truth = weights[key].grad
        assert (model.get_parameter(key).grad.double() - truth).abs().max() < 1e-5 * truth.abs().max()


def mixture(**fields) -> Mixture:
    layer = Mixture(DiTConfig(**{**TINY, "experts": 4, **fields}))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def test_balance_is_one_where_all_are_used_alike_and_the_number_of_experts_where_one_does_everything():
    layer, x = mixture(experts_per_token=1), torch.zeros(1, 8, 24)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[torch.arange(4), torch.arange(4)] = 30.0
    x[0, torch.arange(8), torch.arange(8) % 4] = 1.0
    assert float(layer(x)[1].detach()) == pytest.approx(1, rel=1e-5)
    x.zero_()[..., 2] = 1.0
    assert float(layer(x)[1].detach()) == pytest.approx(4, rel=1e-5)


def test_first_choices_find_room_before_second_ones_and_early_tokens_before_late_ones():
    layer = mixture(experts=2, experts_per_token=2, expert_capacity=0.5)
    x = torch.randn(1, 6, 24)
    with torch.no_grad():  # all six tokens like expert 0 best; each expert has ceil(0.5 * 6 * 2 / 2) = 3 rows
        layer.router.weight.zero_()
        layer.router.weight[0, 0] = 1.0
        x[..., 0] = 1.0
    y, _ = layer(x)
    alone = [layer.experts([x[0], x[0][:0]]), layer.experts([x[0][:0], x[0]])]
    gates = torch.softmax(torch.tensor([1.0, 0.0]), 0)
    kept = gates[0] * alone[0] + gates[1] * alone[1]
    assert torch.allclose(y[0, :3], kept[:3], atol=1e-6) and not y[0, 3:].any()


def test_without_room_for_anyone_only_the_shared_experts_work():
    layer = mixture(expert_capacity=1e-9, shared_experts=1)  # rounded up: one row for each expert
    x = torch.randn(2, 50, 24)
    y, _ = layer(x)
    shared = layer.shared(x)
    served = (y - shared).abs().amax(-1) > 1e-6
    assert 1 <= int(served.sum()) <= 4


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_a_sample_depends_on_those_beside_it_only_with_a_capacity(capacity):
    layer, x = mixture(expert_capacity=capacity).eval(), torch.randn(4, 9, 24)
    together, alone = layer(x)[0], torch.cat([layer(sample)[0] for sample in x.split(1)])
    assert torch.allclose(together, alone, atol=1e-5) == (capacity is None)


def test_the_balance_loss_of_a_batch_is_not_the_mean_of_its_parts():
    layer, x = mixture(experts_per_token=1), torch.zeros(2, 8, 24)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[torch.arange(4), torch.arange(4)] = 30.0
    x[torch.arange(2), :, torch.arange(2)] = 1.0  # each sample goes to an expert of its own
    assert [float(layer(part)[1].detach()) for part in x.split(1)] == pytest.approx([4, 4], rel=1e-5)
    assert float(layer(x)[1].detach()) == pytest.approx(2, rel=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_padding_takes_no_room_and_no_part_in_the_balance_loss(capacity):
    layer, lengths = mixture(expert_capacity=capacity), torch.tensor([4, 9, 2])
    x, other = torch.randn(2, 3, 9, 24)
    counts = torch.arange(9) < lengths[:, None]
    other[counts] = x[counts]
    (y, balance), (y_other, balance_other) = layer(x, lengths), layer(other, lengths)
    assert torch.allclose(y[counts], y_other[counts], atol=1e-6) and torch.equal(balance, balance_other)
    # The loss is that of the tokens alone; and where nothing is padding, nothing changes.
    assert float(balance.detach()) == pytest.approx(float(layer(x[counts][None])[1].detach()), rel=1e-5)
    assert torch.allclose(layer(x, torch.full((3,), 9))[0], layer(x)[0], atol=1e-6)


def test_the_model_tells_its_mixtures_what_is_padding():
    config = config_of("mixture in context", condition="caption", vocabulary_size=11, caption_tokens=4)
    model, longer = randomised(config), randomised(config.replace(caption_tokens=9))
    longer.load_state_dict(model.state_dict())
    (x, t, _), y = inputs_of(config), torch.tensor([[3, 5, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]])
    model(x, t, y)
    longer(x, t, torch.nn.functional.pad(y, (0, 5)))
    assert float(model.balance_loss.detach()) == pytest.approx(float(longer.balance_loss.detach()), rel=1e-5)


@pytest.mark.parametrize("capacity", [None, 0.7])
def test_two_runs_are_equal_to_the_bit(capacity):
    layer, x = mixture(expert_capacity=capacity, mlp="swiglu"), torch.randn(4, 33, 24, requires_grad=True)

    def run():
        layer.zero_grad()
        x.grad = None
        y, balance = layer(x)
        (y.square().sum() + balance).backward()
        return [y.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]

    assert all(map(torch.equal, run(), run()))


def test_the_mean_over_mixtures_is_kept_in_training_only():
    config = config_of("mixture with room", depth=3)
    model, inputs = randomised(config), inputs_of(config)
    model.eval()(*inputs)
    assert model.balance_loss is None
    model.train()(*inputs)
    assert model.balance_loss.requires_grad and 1 <= float(model.balance_loss.detach()) < 4


def test_float64_gradients_by_differences():
    layer = mixture(experts=3).double()
    x = torch.randn(1, 4, 24, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda v: layer(v), (x,), atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_between_its_passes(copied):
    config = config_of("mixture")
    model, inputs = randomised(config).train(), inputs_of(config)
    want = model(*inputs)
    again = copied(model)
    assert model.balance_loss.requires_grad and again.balance_loss is None
    assert torch.equal(again(*inputs), want) and torch.equal(again.balance_loss, model.balance_loss)
