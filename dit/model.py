"""The diffusion transformer: from a noisy image, a time and a condition to a prediction for every pixel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.dit.block import DiTBlock, FinalLayer, Modulation
from ditscale.dit.config import DiTConfig
from ditscale.dit.embed import CaptionEmbed, LabelEmbed, PatchEmbed, TimestepEmbed, position_table, unpatchify
from ditscale.errors import InputError


class DiT(nn.Module):
    """A DiT with adaLN-zero (Peebles & Xie, arXiv:2212.09748), built from a :class:`DiTConfig`.

    Parameter names and shapes are those of the released models, so their state dicts load by name. A new model
    predicts zero everywhere: the modulation and output layers start at zero.

    Args:
        config: the model.

    Raises:
        InputError: the configuration asks for a variant that can be counted but not built here.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        config.need_trainable()
        self.config = config
        d = config.width
        self.x_embedder = PatchEmbed(config.in_channels, config.patch, d)
        self.t_embedder = TimestepEmbed(d, config.frequency_width)
        self.y_embedder: LabelEmbed | CaptionEmbed | None = None
        if config.condition == "class":
            self.y_embedder = LabelEmbed(config.num_classes, d)
        elif config.condition == "caption":
            self.y_embedder = CaptionEmbed(config.vocabulary_size, config.caption_width, d)
        side = config.grid_side(config.image_size)
        self.register_buffer("pos_embed", position_table(d, side).unsqueeze(0))
        self.blocks = nn.ModuleList(DiTBlock(d, config.heads, config.mlp_width) for _ in range(config.depth))
        self.final_layer = FinalLayer(d, config.patch, config.out_channels)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the released DiT does; under muP the time layers follow their width as all others do.

        Linear layers are Xavier-uniform with zero bias; the time layers and the label table are normal with
        standard deviation 0.02; the modulation and output layers are zero.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.config.width, -1))
        self.x_embedder.proj.bias.zero_()  # type: ignore[union-attr]
        if self.config.mup_base_width is None:
            # A constant 0.02 suits widths near 1,000; a narrow model would hardly see the time at first.
            for layer in self.t_embedder.mlp:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        if isinstance(self.y_embedder, LabelEmbed):
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        elif isinstance(self.y_embedder, CaptionEmbed):
            # A caption is a mean of a few words, so unit variance keeps it of order one before the linear layer.
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=1.0)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, drop: Tensor | None = None) -> Tensor:
        """Predict from a noisy input.

        Args:
            x: [B, C, S, S], S = ``config.input_side``.
            t: [B], the time that the sines and cosines encode: 0 to 1000.
            y: labels [B] int64, or caption words [B, K] int64 padded with 0; None where the model takes no condition.
            drop: [B] bool, samples that see no condition (for classifier-free guidance). Default: None.

        Returns:
            [B, C_out, S, S].

        Raises:
            InputError: a shape is not as above, or the condition is missing or unwanted.
        """
        self._check(x, t, y)
        h_BTD = self.x_embedder(x) + self.pos_embed
        c_BD = self.t_embedder(t)
        if self.y_embedder is not None:
            c_BD = c_BD + self.y_embedder(y, drop)
        c_silu_BD = F.silu(c_BD)
        pending = None
        for block in self.blocks:
            h_BTD, pending = block(h_BTD, pending, c_silu_BD)
        out_BTF = self.final_layer(h_BTD, pending, c_silu_BD)
        return unpatchify(out_BTF, self.config.out_channels, self.config.patch)

    def _check(self, x: Tensor, t: Tensor, y: Tensor | None) -> None:
        side = self.config.input_side
        if x.ndim != 4 or x.shape[1:] != (self.config.in_channels, side, side):
            expected = f"[B, {self.config.in_channels}, {side}, {side}]"
            raise InputError(f"x: expected shape {expected}, got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise InputError(f"t: expected shape [{x.shape[0]}], got {list(t.shape)}")
        wanted = self.config.condition
        if (y is None) != (wanted == "none"):
            came = "None" if y is None else f"a tensor of shape {list(y.shape)}"
            raise InputError(f"y: expected {'None' if wanted == 'none' else wanted + ' indices'}, got {came}")
        if y is not None and (y.ndim != (1 if wanted == "class" else 2) or y.shape[0] != x.shape[0]):
            expected = f"[{x.shape[0]}]" if wanted == "class" else f"[{x.shape[0]}, K]"
            raise InputError(f"y: expected shape {expected}, got {list(y.shape)}")
