"""The maximal update parametrisation: which weights it slows down as a model gets wider, and a check that it works.

With Adam the weights that are fed by something that grows with the width learn at ``lr * base_width / width``; whatever is
fed by something of fixed size (patches, waves of the time, words, biases, tables, norms) learns at ``lr`` and is drawn with the
same variance at every width. The number of heads grows with the width and their own width does not; outputs start at zero, so
they need no multiplier beside the learning rate.
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
    """How large the activations are after a few steps, at several widths.

    Attributes:
        widths: of the models, rising.
        sizes: for each part of the model ("t_embedder", "blocks.0", ..., "output"), the mean absolute value of what it
            gives, one number a width.
    """

    widths: tuple[int, ...]
    sizes: dict[str, tuple[float, ...]]

    @property
    def slopes(self) -> dict[str, float]:
        """For each part, the exponent with which its activations grow with the width: 0 where they do not."""
        x = [math.log(width) for width in self.widths]
        middle = sum(x) / len(x)
        spread = sum((v - middle) ** 2 for v in x)
        return {
            name: sum((v - middle) * math.log(size) for v, size in zip(x, sizes, strict=True)) / spread
            for name, sizes in self.sizes.items()
        }

    def __str__(self) -> str:
        lines = [f"{'part':20}" + "".join(f"{width:>10}" for width in self.widths) + "     slope"]
        for name, slope in self.slopes.items():
            lines.append(f"{name:20}" + "".join(f"{size:10.4f}" for size in self.sizes[name]) + f"{slope:10.3f}")
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
        CoordinateCheck of the last step.

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
    sums: dict[str, list[float]] = {}
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
                if step == steps:
                    with torch.no_grad(), _watched(model) as seen:
                        objective.loss(model, x_0, y, eps, t)
                    for name, size in seen.items():
                        sums.setdefault(name, [0.0] * len(widths))[place] += size / seeds
                    break
                optimizer.zero_grad(set_to_none=True)
                objective.loss(model, x_0, y, eps, t).mean().backward()
                optimizer.step()
    return CoordinateCheck(tuple(sorted(widths)), {name: tuple(sizes) for name, sizes in sums.items()})


class _watched:
    """While it is entered, the mean absolute value of what each part of a model gives."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.sizes = model, dict[str, float]()

    def __enter__(self) -> dict[str, float]:
        parts = {name: module for name, module in self.model.named_children() if name != "blocks"}
        parts |= {f"blocks.{name}": block for name, block in self.model.get_submodule("blocks").named_children()}
        parts = {"output" if name == "final_layer" else name: module for name, module in parts.items()}
        self.handles = [module.register_forward_hook(self._seer(name)) for name, module in parts.items()]
        return self.sizes

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _seer(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def see(module: nn.Module, args: Any, out: Any) -> None:
            # A block gives its stream and the branch that is still to be added to it.
            parts = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]
            self.sizes[name] = max(float(part.abs().mean()) for part in parts)

        return see
