"""How a new model's weights are drawn."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from ditscale.dit.block import FinalLayer
from ditscale.dit.condition import CaptionEmbed, LabelEmbed
from ditscale.dit.embed import ScalarEmbed, VectorEmbed
from ditscale.dit.layers import CrossAttention, Modulation, Norm, QKNorm
from ditscale.dit.moe import Experts, Mixture
from ditscale.dit.mup import INPUT_LAYERS

if TYPE_CHECKING:
    from ditscale.dit.model import DiT


@torch.no_grad()
def initialise(model: DiT) -> None:
    """Initialise as the released DiT does; under muP the time layers are as all others.

    Linear layers, each expert's among them, are Xavier-uniform with zero bias; the time layers, the label table and
    learned positions are normal with standard deviation 0.02, a router's with 1 / D; the modulation and output layers,
    the tables of adaLN-single and the output layer of cross-attention, which no gate closes, are zero. Under muP layers
    that are fed by something of fixed width are drawn as at the base width.
    """
    config = model.config
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(config.width, -1))
    nn.init.zeros_(model.x_embedder.proj.bias)  # type: ignore[arg-type]
    if config.mup_base_width is not None:
        # Xavier's variance falls with the width; what is fed by something of fixed width keeps that of the base width.
        modules = dict(model.named_modules())
        for name in INPUT_LAYERS:
            if name in modules:
                weight = modules[name].weight
                fan_in = weight[0].numel()
                weight.mul_(math.sqrt((fan_in + config.width) / (fan_in + config.mup_base_width)))
    else:
        # A constant 0.02 suits widths near 1,000; a narrow model would hardly see the time at first.
        for embedder in model.children():
            if isinstance(embedder, ScalarEmbed | VectorEmbed):
                for layer in embedder.mlp:
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, std=0.02)
    if isinstance(model.y_embedder, LabelEmbed):
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=0.02)
    elif isinstance(model.y_embedder, CaptionEmbed) and model.y_embedder.words:
        # A caption is a mean of a few words, so unit variance keeps it of order one before the linear layer.
        nn.init.normal_(model.y_embedder.embedding_table.weight, std=1.0)
    if config.positions == "learned":
        nn.init.normal_(model.pos_embed, std=0.02)
    for module in model.modules():
        table = getattr(module, "scale_shift_table", None)
        if table is not None:
            nn.init.zeros_(table)
        if isinstance(module, Norm | QKNorm):
            if module.weight is not None:
                nn.init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, Modulation):
            nn.init.zeros_(module.linear.weight)
        elif isinstance(module, CrossAttention):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, FinalLayer):
            nn.init.zeros_(module.linear.weight)
        elif isinstance(module, Mixture):
            # Near-equal chances for all experts at first, at any width.
            nn.init.normal_(module.router.weight, std=1 / config.width)
        elif isinstance(module, Experts):
            for weight, bias in ((module.fc1_weight, module.fc1_bias), (module.fc2_weight, module.fc2_bias)):
                for expert in weight:
                    nn.init.xavier_uniform_(expert)
                nn.init.zeros_(bias)
