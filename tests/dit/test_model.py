"""The DiT against a second statement of it, written from the paper and the released model's layout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ditscale.dit import DiT, DiTConfig
from ditscale.errors import InputError

TINY = {
    "image_size": 8,
    "latent_factor": 1,
    "in_channels": 3,
    "width": 24,
    "depth": 2,
    "heads": 3,
    "frequency_width": 16,
}


def restated(state, config, x, t, y):
    """Forward pass in float64 from a state dict: plain loops and formulas, nothing of the package."""
    w = {name: tensor.double() for name, tensor in state.items()}
    d, p, side = config.width, config.patch, config.image_size // config.latent_factor // config.patch
    b, c = x.shape[:2]
    patches = x.double().unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).reshape(b, side * side, c * p * p)
    h = patches @ w["x_embedder.proj.weight"].reshape(d, -1).T + w["x_embedder.proj.bias"]

    table = torch.zeros(side * side, d, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            for k in range(d // 4):
                omega = 10_000.0 ** (-k / (d // 4))
                token = row * side + column
                table[token, k], table[token, d // 4 + k] = math.sin(column * omega), math.cos(column * omega)
                table[token, d // 2 + k] = math.sin(row * omega)
                table[token, 3 * d // 4 + k] = math.cos(row * omega)
    h = h + table

    half = config.frequency_width // 2
    angles = t.double()[:, None] * torch.exp(-math.log(10_000.0) * torch.arange(half, dtype=torch.float64) / half)
    e = torch.cat([angles.cos(), angles.sin()], 1)
    e = F.silu(e @ w["t_embedder.mlp.0.weight"].T + w["t_embedder.mlp.0.bias"])
    cond = e @ w["t_embedder.mlp.2.weight"].T + w["t_embedder.mlp.2.bias"]
    if config.condition == "class":
        cond = cond + w["y_embedder.embedding_table.weight"][y]
    elif config.condition == "caption":
        means = []
        for words in y.tolist():
            rows = [w["y_embedder.embedding_table.weight"][word] for word in words if word]
            means.append(torch.stack(rows).mean(0) if rows else torch.zeros(config.caption_width, dtype=torch.float64))
        cond = cond + torch.stack(means) @ w["y_embedder.proj.weight"].T + w["y_embedder.proj.bias"]

    def norm(v):
        centred = v - v.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    def modulation(name, parts):
        out = F.silu(cond) @ w[f"{name}.adaLN_modulation.1.weight"].T + w[f"{name}.adaLN_modulation.1.bias"]
        return [part[:, None] for part in out.chunk(parts, 1)]

    for i in range(config.depth):
        block = f"blocks.{i}"
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(block, 6)
        z = norm(h) * (1 + scale_a) + shift_a
        qkv = (z @ w[f"{block}.attn.qkv.weight"].T + w[f"{block}.attn.qkv.bias"]).reshape(
            b, -1, 3, config.heads, d // config.heads
        )
        heads = []
        for k in range(config.heads):
            q, key, value = qkv[:, :, 0, k], qkv[:, :, 1, k], qkv[:, :, 2, k]
            scores = (q @ key.transpose(1, 2)) / math.sqrt(d // config.heads)
            heads.append(torch.softmax(scores, -1) @ value)
        h = h + gate_a * (torch.cat(heads, -1) @ w[f"{block}.attn.proj.weight"].T + w[f"{block}.attn.proj.bias"])
        z = norm(h) * (1 + scale_m) + shift_m
        z = z @ w[f"{block}.mlp.fc1.weight"].T + w[f"{block}.mlp.fc1.bias"]
        z = 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
        h = h + gate_m * (z @ w[f"{block}.mlp.fc2.weight"].T + w[f"{block}.mlp.fc2.bias"])
    shift, scale = modulation("final_layer", 2)
    out = (norm(h) * (1 + scale) + shift) @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
    channels = config.in_channels * (2 if config.learn_sigma else 1)
    out = out.reshape(b, side, side, p, p, channels)
    image = torch.zeros(b, channels, side * p, side * p, dtype=torch.float64)
    for row in range(side):
        for column in range(side):
            tile = out[:, row, column].permute(0, 3, 1, 2)
            image[:, :, row * p : row * p + p, column * p : column * p + p] = tile
    return image


def randomised(config, seed=0):
    """A model none of whose weights is zero, so that every path carries signal."""
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


# One case for each condition; patch 4 and learn_sigma change the layout of patches and channels.
CASES = [
    {"condition": "class", "num_classes": 5},
    {"condition": "caption", "vocabulary_size": 11, "caption_width": 6, "learn_sigma": False},
    {"condition": "none", "patch": 4},
    {"condition": "class", "num_classes": 5, "in_channels": 4, "latent_factor": 2, "image_size": 16, "mlp_ratio": 2.5},
]


def inputs(config, count=3):
    generator = torch.Generator().manual_seed(1)
    side = config.input_side
    x = torch.randn(count, config.in_channels, side, side, generator=generator)
    t = torch.tensor([0.5, 500.0, 999.0][:count])
    if config.condition == "class":
        return x, t, torch.tensor([0, 4, 2][:count])
    if config.condition == "caption":
        # A caption with padding inside and at the end, one full, one empty.
        return x, t, torch.tensor([[3, 0, 7, 0], [1, 2, 3, 4], [0, 0, 0, 0]][:count])
    return x, t, None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["condition"] + str(len(case)))
def test_forward_is_the_paper_s(case):
    config = DiTConfig(**{**TINY, **case})
    model = randomised(config)
    x, t, y = inputs(config)
    exact = restated(model.state_dict(), config, x, t, y)
    assert (model(x, t, y).double() - exact).abs().max() < 2e-5 * exact.abs().max()


def test_gradients_are_those_of_the_restatement():
    config = DiTConfig(**{**TINY, **CASES[1]})
    model = randomised(config)
    x, t, y = inputs(config)
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    restated(weights, config, x, t, y).square().mean().backward()
    model(x, t, y).square().mean().backward()
    for name, parameter in model.named_parameters():
        exact = weights[name].grad
        assert (parameter.grad.double() - exact).abs().max() < 1e-4 * exact.abs().max() + 1e-9, name


def test_a_new_model_predicts_zero_and_learns():
    config = DiTConfig(**{**TINY, **CASES[0]})
    torch.manual_seed(0)
    model = DiT(config)
    x, t, y = inputs(config)
    assert not model(x, t, y).any()
    (model(x, t, y) - 1).square().mean().backward()
    assert model.final_layer.linear.weight.grad.abs().max() == 0 or model.final_layer.linear.bias.grad.any()


def test_dropped_conditions_see_the_null_row_only():
    config = DiTConfig(**{**TINY, **CASES[0]})
    model = randomised(config)
    x, t, y = inputs(config)
    everything = torch.ones(3, dtype=torch.bool)
    assert torch.equal(model(x, t, y, drop=everything), model(x, t, (y + 1) % 5, drop=everything))
    assert not torch.allclose(model(x, t, y), model(x, t, (y + 1) % 5))


def test_state_dict_has_the_released_names():
    config = DiTConfig.preset("DiT-XL/2")
    with torch.device("meta"):
        state = DiT(config).state_dict()
    assert len(state) == 292
    assert state["blocks.27.adaLN_modulation.1.weight"].shape == (6912, 1152)
    assert state["x_embedder.proj.weight"].shape == (1152, 4, 2, 2)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert state["pos_embed"].shape == (1, 256, 1152)
    assert state["final_layer.linear.weight"].shape == (32, 1152)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x, t, y: (x[:, :2], t, y), "x:"),
        (lambda x, t, y: (x, t[:2], y), "t:"),
        (lambda x, t, y: (x, t, None), "y:"),
        (lambda x, t, y: (x, t, y[:, None]), "y:"),
    ],
    ids=["channels", "times", "missing", "rank"],
)
def test_bad_input_is_named(change, named):
    config = DiTConfig(**{**TINY, **CASES[0]})
    with pytest.raises(InputError, match=named):
        DiT(config)(*change(*inputs(config)))
