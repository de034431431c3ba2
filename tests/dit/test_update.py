"""Clipping, AdamW, Muon and averages against a float64 restatement in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from model_variants import config_of
from torch import nn

from ditscale.dit import DiT
from ditscale.dit.average import Profile
from ditscale.dit.moe import Experts
from ditscale.dit.muon import orthogonal
from ditscale.dit.optim import parameter_groups
from ditscale.dit.update import Updater, UpdateRule
from ditscale.errors import InputError
from ditscale.kernels.adamw.native import AVAILABLE


class Small(nn.Module):
    """Two kinds of matrices, banks of three, vectors, and banks of three vectors."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 7)])
        self.blocks[0].bank = Experts(3, 4, 6, swiglu=False)
        for parameter in self.blocks[0].bank.parameters():
            nn.init.normal_(parameter)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        banks = sum(parameter.sum() for parameter in self.blocks[0].bank.parameters())
        return self.head(self.blocks[1](self.blocks[0](x) + self.blocks[2](x)).tanh()) + banks


def orthogonal_twin(g):
    """The quintic iteration of the published method, for one matrix [rows <= columns] or its transpose, in float64."""
    if g.shape[0] > g.shape[1]:
        return orthogonal_twin(g.T).T
    x = g / max(np.sqrt((g**2).sum()), 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def twin(weights, gradients, rates, decays, rule, profile):
    """Every step of a run: dictionaries of float64 arrays in, the weights and their average out."""
    first = {n: np.zeros_like(w) for n, w in weights.items()}
    second = {n: np.zeros_like(w) for n, w in weights.items()}
    average = {n: w.copy() for n, w in weights.items()}
    weights = {n: w.copy() for n, w in weights.items()}
    for step, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        scale = min(1.0, rule.clip / (norm + 1e-6))
        for name, w in weights.items():
            g = grads[name] * scale
            if rule.muon and name.startswith("blocks.") and name.endswith("weight"):
                first[name] = rule.muon_momentum * first[name] + g
                ahead = g + rule.muon_momentum * first[name]
                each = ahead.reshape(-1, *ahead.shape[-2:])
                update = np.stack([orthogonal_twin(m) for m in each]).reshape(ahead.shape)
                update = update * np.sqrt(max(1.0, w.shape[-2] / w.shape[-1]))
                w[...] = w * (1 - rule.muon_lr * decays[name]) - rule.muon_lr * update
            else:
                first[name] = rule.beta1 * first[name] + (1 - rule.beta1) * g
                second[name] = rule.beta2 * second[name] + (1 - rule.beta2) * g**2
                m, v = first[name] / (1 - rule.beta1**step), second[name] / (1 - rule.beta2**step)
                w[...] = w * (1 - rates[name] * decays[name]) - rates[name] * m / (np.sqrt(v) + rule.eps)
            average[name] += (1 - profile.decay(step)) * (w - average[name])
    return weights, average


@pytest.mark.parametrize("muon", [False, True], ids=["adamw", "muon"])
@pytest.mark.parametrize("clip", [0.3, 1e9], ids=["clipped", "free"])
@pytest.mark.parametrize("kernel", [True, False], ids=["kernel", "passes"])
def test_steps_are_those_of_the_restatement(muon, clip, kernel, monkeypatch):
    if not kernel:
        monkeypatch.setattr("ditscale.dit.update.serves", lambda *tensors: False)
    model, profile = Small(), Profile("share", 0.3)
    rule = UpdateRule(clip=clip, muon=muon, muon_lr=0.05, averages=(profile,))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "lr": 0.02, "weight_decay": 0.1},
        {"params": vectors, "lr": 0.01, "weight_decay": 0.0},
    ]
    rates = {n: 0.02 if p.ndim > 1 else 0.01 for n, p in model.named_parameters()}
    decays = {n: 0.1 if p.ndim > 1 else 0.0 for n, p in model.named_parameters()}
    start = {n: p.detach().double().numpy().copy() for n, p in model.named_parameters()}
    updater = Updater(model, groups, rule)
    assert updater._in_one_pass == (kernel and not muon and AVAILABLE)
    gradients = []
    for _ in range(6):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradients.append({n: p.grad.double().numpy().copy() for n, p in model.named_parameters()})
        updater.apply(updater.gradient_norm(), 1.0)
    weights, average = twin(start, gradients, rates, decays, rule, profile)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=2e-5, atol=2e-6, err_msg=name)
        found = updater.averages[0].weights[name].numpy()
        np.testing.assert_allclose(found, average[name], rtol=2e-5, atol=2e-6, err_msg=name)
    assert updater.updates == 6


BY_MUON = {
    "mixture": {
        "adaLN_modulation.1.weight", "attn.qkv.weight", "attn.proj.weight", "mlp.router.weight", "mlp.experts.fc1_weight",
        "mlp.experts.fc2_weight",
    },
    "adaln-single": {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"},
}  # fmt: skip
BY_ADAMW = {
    "mixture": {
        "adaLN_modulation.1.bias", "attn.qkv.bias", "attn.proj.bias", "mlp.experts.fc1_bias", "mlp.experts.fc2_bias",
    },
    "adaln-single": {"attn.qkv.bias", "attn.proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "scale_shift_table"},
}  # fmt: skip


@pytest.mark.parametrize("name", BY_MUON)
def test_muon_steps_the_weights_of_the_blocks_layers_and_adamw_their_biases_and_tables(name):
    model = DiT(config_of(name))
    updater = Updater(model, parameter_groups(model, lr=0.1), UpdateRule(muon=True))
    # AdamW alone keeps second moments.
    by_adamw = {key.removeprefix("second.") for key in updater.tensors() if key.startswith("second.")}
    by_muon = {key for key, _ in model.named_parameters()} - by_adamw
    blocks = range(model.config.depth)
    assert by_muon == {f"blocks.{i}.{part}" for i in blocks for part in BY_MUON[name]}
    assert {key for key in by_adamw if key.startswith("blocks.")} == {
        f"blocks.{i}.{part}" for i in blocks for part in BY_ADAMW[name]
    }
    assert {"x_embedder.proj.weight", "t_embedder.mlp.2.weight", "final_layer.linear.weight"} <= by_adamw


def test_small_weights_that_lie_together_step_as_each_by_itself(monkeypatch):
    """To rounding; they stay the model's parameters, and what is kept of them has its names and shapes."""
    results = []
    for most in (0, 30, 10**6):
        monkeypatch.setattr("ditscale.dit.update._SMALL", most)
        torch.manual_seed(0)
        model = Small()
        parameters = list(model.parameters())
        groups = [
            {"params": parameters[1::2], "lr": 0.02, "weight_decay": 0.1},
            {"params": parameters[::2], "lr": 0.01, "weight_decay": 0.0},
        ]
        updater = Updater(model, groups, UpdateRule(clip=0.3))
        together = len({p.untyped_storage().data_ptr() for p in parameters})
        assert together == {0: len(parameters), 30: 2 + sum(p.numel() > 30 for p in parameters), 10**6: 2}[most]
        for _ in range(3):
            model(torch.randn(4, 5)).square().sum().backward()
            updater.apply(updater.gradient_norm().fill_(2.0), 1.0)  # the norm's sum has another order
            model.zero_grad()
        kept = updater.tensors()
        assert {n: t.shape for n, t in kept.items() if n.startswith("first")} == {
            f"first.{n}": p.shape for n, p in model.named_parameters()
        }
        results.append([t.clone() for t in (*parameters, *kept.values(), *updater.averages[0].weights.values())])
    for other in results[1:]:  # a vector's last numbers are rounded in another way than those in its middle
        for one, same in zip(results[0], other, strict=True):
            torch.testing.assert_close(same, one, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (3, 8, 20)])
def test_orthogonal_keeps_directions_and_evens_out_lengths(shape):
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = torch.diagonal(u.mT @ orthogonal(matrix).double() @ v.mT, dim1=-2, dim2=-1)
    # The published coefficients leave singular values that were not tiny between about 0.7 and 1.2.
    assert kept[s > 0.1 * s.amax()].min() > 0.6 and kept.max() < 1.25
    low = orthogonal(matrix, dtype=torch.bfloat16)
    assert low.dtype == torch.float32 and (low - orthogonal(matrix)).abs().max() < 0.05


def test_averages_stand_in_for_the_weights_and_give_way():
    model = Small()
    updater = Updater(model, [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0}], UpdateRule())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    updater.apply(updater.gradient_norm(), 1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), updater.averaged():
        inside = {n: p.detach().clone() for n, p in model.named_parameters()}
        raise ZeroDivisionError
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and not torch.equal(inside[name], before[name])
        assert torch.equal(inside[name], updater.averages[0].weights[name])


def test_a_parameter_that_learns_nothing_is_named():
    model = Small()
    updater = Updater(model, [{"params": list(model.parameters()), "lr": 0.1, "weight_decay": 0.0}], UpdateRule())
    with pytest.raises(InputError, match="blocks.0.weight"):
        updater.gradient_norm()
