"""The example that swaps fused operators into diffusers' DiT: outputs and gradients stay."""

from __future__ import annotations

import copy
import runpy
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples/diffusers_kernels.py"


def test_swapped_operators_change_no_number():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {
        "num_attention_heads": 3,
        "attention_head_dim": 8,
        "num_layers": 2,
        "sample_size": 8,
        "num_embeds_ada_norm": 5,
    }
    plain = diffusers.DiTTransformer2DModel(**sizes, norm_eps=1e-3).eval()
    with torch.no_grad():  # gates that are open, and a norm_eps that shows
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    fused = runpy.run_path(str(EXAMPLE))["use_fused_operators"](copy.deepcopy(plain))
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([10, 900]), torch.tensor([2, 4])
    outputs = [model(x, t, y).sample for model in (plain, fused)]
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5 * outputs[0].abs().max()
    for out in outputs:
        out.square().mean().backward()
    # A key's bias has no gradient but for rounding, so all are held to the largest.
    largest = max(float(p.grad.abs().max()) for p in plain.parameters())
    for (name, a), b in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() < 1e-6 * largest, name
    assert list(plain.state_dict()) == list(fused.state_dict())
    assert fused.transformer_blocks[0].forward.__func__.__name__ == "fused_forward"
    # Checkpointing calls a block with its arguments by their place.
    fused.train().enable_gradient_checkpointing()
    before = [p.grad.clone() for p in fused.parameters()]
    fused.zero_grad()
    drops = [m for m in fused.modules() if hasattr(m, "dropout_prob")]
    for module in drops:
        module.dropout_prob = 0.0  # no label is dropped, so that the step is the same one
    fused(x, t, y).sample.square().mean().backward()
    assert drops
    for a, p in zip(before, fused.parameters(), strict=True):
        assert (a - p.grad).abs().max() < 1e-6 * largest
