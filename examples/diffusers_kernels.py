"""Swap the fused operators into the blocks of a diffusers DiT: same weights, same names, same outputs.

Run: python examples/diffusers_kernels.py        (needs diffusers: pip install 'ditscale[hub]')
"""

import types

import torch
import torch.nn.functional as F

from ditscale.kernels import (
    attention,
    bias_gelu,
    gate_residual,
    gate_residual_layernorm_modulate,
    layernorm_modulate,
    linear,
)


def fused_forward(  # a DiT leaves the masks and encoder_hidden_states empty; checkpointing gives all by their place
    block,
    hidden_states,
    attention_mask=None,
    encoder_hidden_states=None,
    encoder_attention_mask=None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
):
    """What a ``BasicTransformerBlock`` with ``norm_type="ada_norm_zero"`` computes, its memory-bound lines fused."""
    x, attn, (first, _, second) = hidden_states, block.attn1, block.ff.net
    c = block.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.norm1.linear(F.silu(c)).chunk(6, dim=1)
    y = layernorm_modulate(x, shift_a, scale_a)
    q, k, v = (layer(y).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
    y = attn.to_out[0](attention(q, k, v).transpose(1, 2).flatten(2))
    x, y = gate_residual_layernorm_modulate(x, y, gate_a, shift_m, scale_m, eps=block.norm3.eps)
    return gate_residual(x, second(bias_gelu(linear(y, first.proj.weight), first.proj.bias)), gate_m)


def use_fused_operators(model):
    """Change the blocks of a ``DiTTransformer2DModel`` in place; dropout, which the released models lack, is left out."""
    for block in model.transformer_blocks:
        block.forward = types.MethodType(fused_forward, block)
    return model


if __name__ == "__main__":
    try:
        from diffusers import DiTTransformer2DModel
    except ImportError:
        raise SystemExit(print("diffusers is not installed: pip install 'ditscale[hub]'")) from None
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=3, sample_size=16, out_channels=8
    ).eval()
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.tensor([207, 360])
    with torch.no_grad():
        before = model(x, t, y).sample
        after = use_fused_operators(model)(x, t, y).sample
    print(
        f"largest difference {float((after - before).abs().max()):.1e} of outputs up to {float(before.abs().max()):.2f}"
    )
