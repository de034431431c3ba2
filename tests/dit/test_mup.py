"""The maximal update parametrisation keeps activations where they are as a model gets wider; the standard one does not."""

from __future__ import annotations

import pytest
import torch
from model_variants import config_of, inputs_of

from ditscale.dit import DiT, optim
from ditscale.dit.mup import coordinate_check, hidden_matrices
from ditscale.dit.optim import parameter_groups
from ditscale.errors import InputError

WIDTHS = (16, 64, 256)
VARIANTS = [
    "adaln-zero",
    "adaln-single, cross-attention",
    "in-context, words",
    "joint, then single",
    "rms, swiglu, qk-norm, rope",
    "grouped queries",
    "mixture",
    "video, space-time, gated",
]


def batch(config, generator):
    shape = config.input_shape
    level = torch.randn(16, shape[0], *[1] * (len(shape) - 1), generator=generator)
    return level + 0.3 * torch.randn(16, *shape, generator=generator), inputs_of(config, 16)[2]


def check(name, base, **settings):
    config = config_of(name, width=16, heads=2, depth=2, kv_heads=1 if "grouped" in name else None, mup_base_width=base)
    return coordinate_check(config, WIDTHS, batch, lr=0.02, **settings)


@pytest.mark.parametrize("name", VARIANTS)
def test_activations_keep_their_size(name):
    found = check(name, 16, seeds=1)
    assert {"x_embedder", "t_embedder", "blocks.0", "blocks.1", "output"} <= found.sizes.keys()
    wrong = {part: slope for part, slope in found.slopes.items() if abs(slope) > 0.2}
    assert not wrong, f"\n{found}"


@pytest.mark.parametrize(("left", "part"), [("final_layer.linear", "output"), ("attn.qkv", "blocks.0.attn.logits")])
def test_a_layer_that_is_not_slowed_down_is_found(left, part, monkeypatch):
    monkeypatch.setattr(optim, "hidden_matrices", lambda model: {n for n in hidden_matrices(model) if left not in n})
    found = check("in-context, words", 16, seeds=1)
    assert max(found.slopes, key=found.slopes.get) == part and found.slopes[part] > 0.5, f"\n{found}"


@pytest.mark.parametrize("name", ["adaln-zero", "in-context, words", "joint"])
def test_the_standard_parametrisation_fails_the_check(name):
    found = check(name, None, seeds=1)
    assert max(found.slopes["blocks.0"], found.slopes["blocks.1"]) > 0.5, f"\n{found}"


@pytest.mark.parametrize(
    ("name", "fixed"),
    [
        (
            "joint, then single",
            {"x_embedder.proj", "y_embedder.proj", *(f"{n}_embedder.mlp.0" for n in ("t", "guidance", "pooled"))},
        ),
        ("mixture", {"x_embedder.proj", "t_embedder.mlp.0", "y_embedder.embedding_table"}),
        ("adaln-single, cross-attention", {"x_embedder.proj", "t_embedder.mlp.0", "y_embedder.y_proj.fc1"}),
        ("adaln-zero, words", {"x_embedder.proj", "t_embedder.mlp.0", "y_embedder.proj", "y_embedder.embedding_table"}),
    ],
)
def test_every_other_matrix_learns_by_its_width(name, fixed):
    model = DiT(config_of(name, mup_base_width=6))
    matrices = {key for key, p in model.named_parameters() if p.ndim >= 2 and "bias" not in key and "table" not in key}
    matrices |= {key for key, _ in model.named_parameters() if "embedding_table" in key}
    vectors = {"blocks.0.scale_shift_table", "final_layer.scale_shift_table"}
    slowed = hidden_matrices(model)
    assert slowed == {key for key in matrices - vectors if key.removesuffix(".weight") not in fixed}
    groups = parameter_groups(model, lr=0.4)
    by_rate = {group["lr"]: {id(p) for p in group["params"]} for group in groups}
    assert min(by_rate) == pytest.approx(0.4 * 6 / 24) and max(by_rate) == 0.4
    assert by_rate[min(by_rate)] == {id(model.get_parameter(key)) for key in slowed}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_inputs_are_drawn_as_at_the_base_width():
    torch.manual_seed(0)
    bounds = []
    for width in (24, 240):
        model = DiT(config_of("adaln-zero, words", width=width, mup_base_width=24))
        bounds.append(
            [float(model.get_submodule(n).weight.detach().abs().max()) for n in ("x_embedder.proj", "y_embedder.proj")]
        )
    assert bounds[0] == pytest.approx([(6 / 36) ** 0.5, (6 / 30) ** 0.5], rel=0.05)
    assert bounds[1] == pytest.approx(bounds[0], rel=0.05)


def test_bad_widths_are_named():
    config = config_of("adaln-zero", mup_base_width=24)
    for widths in ((16,), (16, 20)):
        with pytest.raises(InputError, match="widths"):
            coordinate_check(config, widths, batch, lr=0.01)
    with pytest.raises(InputError, match="at least two"):
        coordinate_check(config, (24,), batch, lr=0.01)
