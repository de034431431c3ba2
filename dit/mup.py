"""The maximal update parametrisation: which weights it slows down as a model gets wider, and a check that it works.

With Adam the weights that are fed by something that grows with the width learn at ``lr * base_width / width``; whatever is
fed by something of fixed size (patches, waves of the time, words, biases, tables, norms) learns at ``lr`` and is drawn with the
same variance at every width. The number of heads must grow with the width and their own width must not, as attention's logits
are not scaled by it; nothing refuses a head width that grows. Outputs start at zero, so they need no multiplier beside the
learning rate.
One learning rate then serves every width (arXiv:2203.03466, table 3; for DiT, PixArt and MMDiT arXiv:2505.15270).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ditscale.dit.config import DiTConfig
from ditscale.dit.layers import Attention
from ditscale.dit.moe import Experts
from ditscale.dit.objective import Objective
from ditscale.errors import InputError

# Layers that are fed by something of fixed width.
INPUT_LAYERS = (
    "x_embedder.proj",
    "t_embedder.mlp.0",
    "guidance_embedder.mlp.0",
    "pooled_embedder.mlp.0",
    "y_embedder.proj",
    "y_embedder.y_proj.fc1",
)


def hidden_matrices(model: nn.Module) -> set[str]:
    """Names of the parameters of a DiT that are matrices whose input grows with the model's width."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in INPUT_LAYERS:
            names.add(f"{name}.weight")
        elif isinstance(module, Experts):
            names |= {f"{name}.fc1_weight", f"{name}.fc2_weight"}
    return names


@dataclass(frozen=True)
class CoordinateCheck:
    """How large the activations are after each of a few steps, at several widths.

    Attributes:
        widths: of the models, rising.
        sizes: for each part of the model ("t_embedder", "blocks.0", "blocks.0.attn.logits", ..., "output"), the mean
            absolute value of what it gives, one row a step from the first on, one number a width.
    """

    widths: tuple[int, ...]
    sizes: dict[str, tuple[tuple[float, ...], ...]]

    def slope(self, sizes: Sequence[float]) -> float:
        """The exponent with which sizes, one a width, grow with the width: 0 where they do not, or are all still zero."""
        if not any(sizes):
            return 0.0
        x = [math.log(width) for width in self.widths]
        middle = sum(x) / len(x)
        spread = sum((v - middle) ** 2 for v in x)
        return sum((v - middle) * math.log(size) for v, size in zip(x, sizes, strict=True)) / spread

    @property
    def steepest(self) -> dict[str, int]:
        """For each part, the step (0 is the first) after which its activations depend most on the width.

        A layer whose rate is wrong may move too far in the first step and be pulled back by the next ones.
        """
        slopes = {name: [abs(self.slope(row)) for row in rows] for name, rows in self.sizes.items()}
        return {name: steps.index(max(steps)) for name, steps in slopes.items()}

    @property
    def slopes(self) -> dict[str, float]:
        """For each part, the steepest exponent of any step."""
        return {name: self.slope(self.sizes[name][step]) for name, step in self.steepest.items()}

    def __str__(self) -> str:
        lines = [f"{'part':22}" + "".join(f"{width:>10}" for width in self.widths) + "     slope  of step"]
        for name, step in self.steepest.items():
            row = self.sizes[name][step]
            lines.append(f"{name:22}" + "".join(f"{v:10.4f}" for v in row) + f"{self.slope(row):10.3f}{step + 1:9}")
        return "\n".join(lines)


def coordinate_check(
    config: DiTConfig,
    widths: Sequence[int],
    inputs: Callable[[DiTConfig, torch.Generator], tuple[Tensor, Any]],
    *,
    lr: float,
    steps: int = 6,
    seeds: int = 3,
    objective: Objective | None = None,
) -> CoordinateCheck:
    """Train the same model at several widths for a few steps and measure its activations.

    Under the maximal update parametrisation they keep their size as the width grows; under the standard one they grow
    without bound, and the best learning rate falls with the width (arXiv:2203.03466, appendix D).

    Args:
        config: the model; its head width and its ``mup_base_width`` (None for the standard parametrisation) hold for all
            widths.
        widths: at least two, multiples of the head width.
        inputs: makes one batch, images and conditions, from a configuration and a generator.
        lr: learning rate, at the base width under muP.
        steps: of Adam. Default: 6.
        seeds: runs that are averaged at each width. Default: 3.
        objective: what is trained. Default: rectified flow.

    Returns:
        CoordinateCheck of all steps.

    Raises:
        InputError: fewer than two widths, or one that is no multiple of the head width.
    """
    from ditscale.dit.flow import RectifiedFlow
    from ditscale.dit.model import DiT
    from ditscale.dit.optim import parameter_groups

    head, groups = config.width // config.heads, config.heads // config.key_heads
    for width in widths:
        if width % (head * groups):
            raise InputError(f"widths: expected multiples of {head * groups}, whole groups of heads, got {width}")
    if len(widths) < 2:
        raise InputError(f"widths: expected at least two, got {list(widths)}")
    objective = objective or RectifiedFlow()
    sums: dict[str, list[list[float]]] = {}
    for place, width in enumerate(sorted(widths)):
        heads = width // head
        kv_heads = None if config.kv_heads is None else heads // groups
        wide = config.replace(width=width, heads=heads, kv_heads=kv_heads)
        for seed in range(seeds):
            torch.manual_seed(seed)
            model, generator = DiT(wide), torch.Generator().manual_seed(seed)
            optimizer = torch.optim.Adam(parameter_groups(model, lr=lr), betas=(0.9, 0.95))
            x_0, y = inputs(wide, generator)
            for step in range(steps + 1):
                eps = torch.randn(x_0.shape, generator=generator)
                t = objective.sample_times(len(x_0), generator)
                optimizer.zero_grad(set_to_none=True)
                with _watched(model) as seen:
                    loss = objective.loss(model, x_0, y, eps, t).mean()
                for name, size in seen.items() if step else ():  # a new model's outputs are zero
                    rows = sums.setdefault(name, [[0.0] * len(widths) for _ in range(steps)])
                    rows[step - 1][place] += size / seeds
                if step < steps:
                    loss.backward()
                    optimizer.step()
    return CoordinateCheck(tuple(sorted(widths)), {name: tuple(map(tuple, rows)) for name, rows in sums.items()})


class _watched:
    """While it is entered, the mean absolute value of what each part of a model gives, and of self-attention's logits."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.sizes = model, dict[str, float]()

    def __enter__(self) -> dict[str, float]:
        parts = {name: module for name, module in self.model.named_children() if name != "blocks"}
        parts |= {f"blocks.{name}": block for name, block in self.model.get_submodule("blocks").named_children()}
        parts = {"output" if name == "final_layer" else name: module for name, module in parts.items()}
        self.handles = [module.register_forward_hook(self._seer(name)) for name, module in parts.items()]
        for name, module in self.model.named_modules():
            if isinstance(module, Attention):
                self.handles.append(module.qkv.register_forward_hook(self._logits_seer(f"{name}.logits", module)))
        return self.sizes

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _seer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, args: Any, out: Any) -> None:
            # A block gives its stream and the branch that is still to be added to it.
            parts = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
            self.sizes[name] = max(float(part.detach().abs().mean()) for part in parts)

        return see

    def _logits_seer(self, name: str, layer: Attention) -> Callable[[nn.Module, Any, Tensor], None]:
        def see(module: nn.Module, args: Any, out: Tensor) -> None:
            # Before the rotary embedding, which turns pairs of numbers and keeps their length.
            q_BHTK, k_BGTK, _ = layer.split(out.detach(), None)
            k_BHTK = k_BGTK.repeat_interleave(layer.heads // layer.key_heads, dim=1)
            logits = q_BHTK @ k_BHTK.transpose(-1, -2) / math.sqrt(layer.head_width)
            self.sizes[name] = float(logits.detach().abs().mean())

        return see
