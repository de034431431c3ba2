"""The maximal update parametrisation: which weights it slows down as a model gets wider, and whether it works.

With Adam the weights that are fed by something that grows with the width learn at ``lr * base_width / width``; whatever is
fed by something of fixed size (patches, waves of the time, words, biases, tables, norms) learns at ``lr``. The number of heads
grows with the width and their own width does not; outputs start at zero, so they need no multiplier beside the learning rate.
One learning rate then serves every width (arXiv:2203.03466, table 3; for DiT, PixArt and MMDiT arXiv:2505.15270).
"""

from __future__ import annotations

from torch import nn

from ditscale.dit.moe import Experts

# Layers that are fed by something of fixed width.
_INPUT_LAYERS = frozenset(
    {
        "x_embedder.proj",
        "t_embedder.mlp.0",
        "guidance_embedder.mlp.0",
        "pooled_embedder.mlp.0",
        "y_embedder.proj",
        "y_embedder.y_proj.fc1",
    }
)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters of a DiT that are matrices whose input grows with the model's width."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in _INPUT_LAYERS:
            names.add(f"{name}.weight")
        elif isinstance(module, Experts):
            names |= {f"{name}.fc1_weight", f"{name}.fc2_weight"}
    return names
