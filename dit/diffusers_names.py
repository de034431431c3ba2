"""The released DiT's tensors under the names of diffusers' ``DiTTransformer2DModel``, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ditscale.errors import InputError

# The released name's beginning -> diffusers'. What stands in every block there is told in to_diffusers.
_TOP = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.linear": "proj_out_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
}
_EVERY_BLOCK = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def to_diffusers(name: str, tensor: Tensor, depth: int) -> dict[str, Tensor]:
    """One released tensor under diffusers' names; each block there has the time and label embedders of its own."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return {f"{_TOP[stem]}.{kind}": tensor}
    if stem in _EVERY_BLOCK:
        # Copies, since safetensors writes no tensor twice.
        return {f"transformer_blocks.{i}.{_EVERY_BLOCK[stem]}.{kind}": tensor.clone() for i in range(depth)}
    _, index, part = stem.split(".", 2)
    block = f"transformer_blocks.{index}"
    if part == "attn.qkv":
        pieces = zip(_QKV, tensor.chunk(3), strict=True)
        return {f"{block}.{piece}.{kind}": chunk.contiguous() for piece, chunk in pieces}
    return {f"{block}.{_IN_BLOCK[part]}.{kind}": tensor}


def from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' tensors under the released names, positions left out; a name that is not known stays as it is.

    Raises:
        InputError: the blocks' embedders of time and label differ, of which the released model has one.
    """
    top, once, inside = ({new: old for old, new in table.items()} for table in (_TOP, _EVERY_BLOCK, _IN_BLOCK))
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        match = re.match(r"transformer_blocks\.(\d+)\.(.*)", stem)
        if match is None:
            found[f"{top.get(stem, stem)}.{kind}"] = tensor
        elif match.group(2) in once:
            shared = f"{once[match.group(2)]}.{kind}"
            if shared in found and not torch.equal(found[shared], tensor):
                raise InputError(f"{name}: expected the values of the other blocks, got others: no released DiT")
            found[shared] = tensor
        elif match.group(2) in _QKV:
            if match.group(2) == _QKV[0]:
                names = [f"transformer_blocks.{match.group(1)}.{part}.{kind}" for part in _QKV]
                parts = [tensors[n] for n in names if n in tensors]
                if tensor.ndim == 0 or any(part.shape[1:] != tensor.shape[1:] for part in parts):
                    shapes = [list(part.shape) for part in parts]
                    raise InputError(f"{name}: expected queries, keys and values of one width, got {shapes}")
                found[f"blocks.{match.group(1)}.attn.qkv.{kind}"] = torch.cat(parts)
        else:
            found[f"blocks.{match.group(1)}.{inside.get(match.group(2), match.group(2))}.{kind}"] = tensor
    return found
