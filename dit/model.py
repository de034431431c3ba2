"""The diffusion transformer: from a noisy image or video, a time and a condition to a prediction for every pixel."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.dit.block import Around, DiTBlock, FinalLayer
from ditscale.dit.condition import CaptionEmbed, LabelEmbed
from ditscale.dit.config import DiTConfig
from ditscale.dit.counting import kept
from ditscale.dit.embed import PatchEmbed, ScalarEmbed, VectorEmbed, position_table, unpatchify
from ditscale.dit.flops import condition_tokens
from ditscale.dit.initial import initialise
from ditscale.dit.joint import JointBlock, SingleBlock
from ditscale.dit.layers import Modulation, Pending, Turns, hold_table, settle
from ditscale.dit.routing import kept_tokens, put_back, taken
from ditscale.errors import InputError
from ditscale.kernels.rotary.tables import rotary_table

# The guidance scale is embedded like the time, which runs to 1000.
GUIDANCE_SCALE = 1000.0


class DiT(nn.Module):
    """A diffusion transformer of any variant that a :class:`DiTConfig` describes.

    Parameter names and shapes of the default variant, adaLN-zero (Peebles & Xie, arXiv:2212.09748), are those of the
    released DiT and SiT, so their state dicts load by name; those of adaLN-single with cross-attention follow
    PixArt-alpha where it has the same parts, but for the queries, keys and values of cross-attention (``q`` and ``kv``
    here, ``q_linear`` and ``kv_linear`` there). A new model predicts zero everywhere: the output layer starts at zero, and
    so do the modulations, which close every gate, and the output layer of cross-attention, which has none. Without gates
    ("adaln", "none") the other branches start open.

    Attributes:
        config: the model.
        balance_loss: of the last forward pass in training, the mixtures' mean balance loss, a scalar with a gradient (see
            :class:`ditscale.dit.moe.Mixture`); None for a model without mixtures.

    Args:
        config: the model.

    Raises:
        InputError: the configuration asks for something that can be counted but not built here.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        config.need_trainable()
        self.config = config
        self.balance_loss: Tensor | None = None
        d = config.width
        self.patch: tuple[int, ...] = (config.patch, config.patch)
        if config.is_video:
            self.patch = (config.patch_frames, *self.patch)
        self.x_embedder = PatchEmbed(config.in_channels, self.patch, d)
        self.t_embedder = ScalarEmbed(d, config.frequency_width)
        self.y_embedder: LabelEmbed | CaptionEmbed | None = None
        if config.condition == "class":
            self.y_embedder = LabelEmbed(config.num_classes, d)
        elif config.condition == "caption":
            self.y_embedder = CaptionEmbed(config)
        if config.guidance_embed:
            self.guidance_embedder = ScalarEmbed(d, config.frequency_width)
        if config.pooled_width:
            self.pooled_embedder = VectorEmbed(config.pooled_width, d)
        if config.positions == "learned":
            self.pos_embed = nn.Parameter(torch.empty(1, config.tokens, d))
        if config.modulation == "adaln-single":
            # Under PixArt-alpha's name.
            self.t_block = Modulation(d, 9 if config.attention == "space-time" else 6)
        if config.context == "joint":
            last = -1 if config.single_depth else config.depth - 1
            self.blocks = nn.ModuleList(JointBlock(config, closed=i == last) for i in range(config.depth))
            self.blocks.extend(SingleBlock(config) for _ in range(config.single_depth))
        else:
            self.blocks = nn.ModuleList(DiTBlock(config, i) for i in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.make_tables()
        initialise(self)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along time, height and width."""
        return self.config.grid(self.config.image_size, self.config.image_width)

    def make_tables(self) -> None:
        """Fixed positions, and the tables of the rotary position embedding that the blocks need; the condition's tokens do not
        turn."""
        config, (frames, rows, columns) = self.config, self.grid
        if config.positions == "sincos":
            hold_table(self, "pos_embed", position_table(config.width, self.grid).unsqueeze(0), saved=True)
        if not config.rope:
            return
        k = config.width // config.heads
        if config.attention == "full":
            tables = {"turns": rotary_table((rows, columns) if frames == 1 else self.grid, k)}
        else:
            tables = {"space": rotary_table((rows, columns), k), "time": rotary_table((frames,), k)}
        others = condition_tokens(config) + (config.modulation == "none")
        if config.context == "in-context" or config.single_depth:
            cos, sin = tables["turns"]
            longer = F.pad(cos, (0, 0, 0, others), value=1.0), F.pad(sin, (0, 0, 0, others))
            tables["all" if config.single_depth else "turns"] = longer
        for name, (cos, sin) in tables.items():
            hold_table(self, f"{name}_cos", cos)
            hold_table(self, f"{name}_sin", sin)

    def turns(self, name: str) -> Turns | None:
        """A table of :meth:`make_tables`, or None where the model has none of that name."""
        cos = getattr(self, f"{name}_cos", None)
        return None if cos is None else Turns(cos, getattr(self, f"{name}_sin"))

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file of the model holds: no balance loss, which belongs to a pass and whose graph cannot be copied."""
        return self.__dict__ | {"balance_loss": None}

    def reset_parameters(self) -> None:
        """Draw the weights anew and make the fixed tables again.

        A model that was made on the meta device and given memory by ``to_empty`` needs it, also where a state dict follows:
        that holds no tables that the configuration tells.
        """
        for module in self.modules():
            if isinstance(module, DiT | ScalarEmbed | CaptionEmbed):
                module.make_tables()
        initialise(self)

    def forward(
        self, x: Tensor, t: Tensor, y: Any = None, *, drop: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        """Predict from a noisy input.

        Args:
            x: [B, C, H, W], or [B, C, F, H, W] for video: ``config.input_shape`` behind B.
            t: [B], the time that the sines and cosines encode: 0 to 1000.
            y: labels [B] int64; caption words [B, K] int64 padded with 0 (K = ``config.caption_tokens`` where they are
                tokens); features of a text encoder [B, S, W], padded with rows of zeros; where ``config.pooled_width`` is
                set a pair of that and the pooled vectors [B, V]; None where the model takes no condition.
            drop: bool [B], samples that see no condition (for classifier-free guidance). Default: None.
            guidance: [B], the guidance scale that a distilled model (``config.guidance_embed``) is told. Default: 1.

        Returns:
            [B, C_out, ...], the shape of x but for the channels.

        Raises:
            InputError: a shape is not as above, the condition is missing or unwanted, or (on a CPU) a label or word is none.
        """
        config = self.config
        y, pooled = self._check(x, t, y)
        for name, value in (("drop", drop), ("guidance", guidance)):
            if value is not None and value.shape != t.shape:
                raise InputError(f"{name}: expected shape {list(t.shape)}, got {list(value.shape)}")
        h_BTD = self.x_embedder(x)
        if config.positions != "none":
            h_BTD = h_BTD + self.pos_embed
        c_BD = self.t_embedder(t)
        context, lengths = None, None
        if isinstance(self.y_embedder, CaptionEmbed) and config.context != "pooled":
            context, lengths = self.y_embedder.tokens(y, drop)
        elif self.y_embedder is not None:
            label_BD = self.y_embedder(y, drop)
            if config.context == "pooled":
                c_BD = c_BD + label_BD
            else:
                context = label_BD.unsqueeze(1)
        if config.guidance_embed:
            scale_B = torch.ones_like(t) if guidance is None else guidance
            c_BD = c_BD + self.guidance_embedder(GUIDANCE_SCALE * scale_B)
        if pooled is not None:
            c_BD = c_BD + self.pooled_embedder(pooled, drop)
        if config.modulation == "none":
            # The time is the first token of the context, so that a caption's padding stays last.
            time_B1D = c_BD.unsqueeze(1)
            context = time_B1D if context is None else torch.cat([time_B1D, context], dim=1)
            lengths = None if lengths is None else lengths + 1
        c_silu_BD = None if config.modulation == "none" else F.silu(c_BD)
        if config.context == "joint" and context is not None:
            h_BTD, pending = self._joint(h_BTD, context, lengths, F.silu(c_BD))
        else:
            h_BTD, pending = self._one_stream(h_BTD, context, lengths, c_silu_BD, (t, x))
        out_BTF = self.final_layer(h_BTD, pending, c_BD, c_silu_BD)
        return unpatchify(out_BTF, config.out_channels, self.patch, self.grid[-len(self.patch) :])

    def _one_stream(
        self,
        h: Tensor,
        context: Tensor | None,
        lengths: Tensor | None,
        c_silu: Tensor | None,
        seen: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Pending | None]:
        config, tokens = self.config, h.shape[1]
        joined = config.context == "in-context"
        around = Around(None if joined else context, None if joined else lengths)
        if joined and context is not None:
            h = torch.cat([h, context], dim=1)
            around = Around(lengths=None if lengths is None else lengths + tokens)
        around = around._replace(turns=self.turns("turns"), space=self.turns("space"), time=self.turns("time"))
        c = c_silu
        if config.modulation == "adaln-single":
            c = torch.stack(self.t_block(c_silu), dim=1)
        if config.token_keep and self.training:
            h, pending, balance = self._routed(h, c, around, seen, tokens)
        else:
            pending = None
            for block in self.blocks:
                h, pending = block(h, pending, c, around)
            balance = None if pending is None else pending.balance
        if self.training and balance is not None:
            self.balance_loss = balance / len(range(0, config.depth, config.moe_every))
        return first_tokens(h, pending, tokens) if joined else (h, pending)

    def _routed(
        self, h: Tensor, c: Tensor | None, around: Around, seen: tuple[Tensor, Tensor], tokens: int
    ) -> tuple[Tensor, Pending | None, Tensor | None]:
        """The blocks, each on its share of the image's tokens, which follows from the time and the noisy input (``seen``);
        the condition's tokens are in every share.
        """
        others = torch.arange(tokens, h.shape[1], device=h.device).expand(h.shape[0], -1)
        whole, index, share, here = h, None, 1.0, around
        pending: Pending | None = None
        balances: list[Tensor] = []
        for i, (block, wanted) in enumerate(zip(self.blocks, self.config.token_keep, strict=True)):
            if wanted != share:
                whole = h = whole_again(whole, index, h, pending)
                if pending is not None and pending.balance is not None:
                    balances.append(pending.balance)
                pending, index, share, here = None, None, wanted, around
                if wanted < 1:
                    count = kept(tokens, wanted)
                    index = torch.cat([kept_tokens(*seen, tokens, count, salt=i), others], dim=1)
                    h = taken(whole, index)
                    if around.turns is not None:
                        here = here._replace(turns=Turns(*(table[index] for table in around.turns)))
                    if around.lengths is not None:
                        here = here._replace(lengths=around.lengths - tokens + count)
            h, pending = block(h, pending, c, here)
        if pending is not None and pending.balance is not None:
            balances.append(pending.balance)
        balance = torch.stack(balances).sum() if balances else None
        return (h, pending, balance) if index is None else (whole_again(whole, index, h, pending), None, balance)

    def _joint(
        self, h: Tensor, context: Tensor, lengths: Tensor | None, c_silu: Tensor
    ) -> tuple[Tensor, Pending | None]:
        tokens, pending, z, z_pending = h.shape[1], None, context, None
        lengths = None if lengths is None else lengths + tokens
        around = Around(lengths=lengths, turns=self.turns("turns"))
        depth = self.config.depth
        for block in islice(self.blocks, depth):
            h, pending, z, z_pending = block(h, pending, z, z_pending, c_silu, around)
        if len(self.blocks) == depth:
            return h, pending
        h, pending = torch.cat([settle(h, pending), settle(z, z_pending)], dim=1), None
        around = Around(lengths=lengths, turns=self.turns("all"))
        for block in islice(self.blocks, depth, None):
            h, pending = block(h, pending, c_silu, around)
        return first_tokens(h, pending, tokens)

    def _check(self, x: Tensor, t: Tensor, y: Any) -> tuple[Any, Tensor | None]:
        """The condition in its two parts, after everything has been looked at."""
        config = self.config
        if x.shape[1:] != config.input_shape:
            expected = ", ".join(map(str, config.input_shape))
            raise InputError(f"x: expected shape [B, {expected}], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise InputError(f"t: expected shape [{x.shape[0]}], got {list(t.shape)}")
        pooled = None
        if config.pooled_width:
            if not (isinstance(y, tuple) and len(y) == 2):
                raise InputError(f"y: expected a pair of tokens and pooled vectors, got {type(y).__name__}")
            y, pooled = y
            if pooled.shape != (x.shape[0], config.pooled_width):
                raise InputError(
                    f"y[1]: expected shape [{x.shape[0]}, {config.pooled_width}], got {list(pooled.shape)}"
                )
        if not (y is None or isinstance(y, Tensor)):
            raise InputError(f"y: expected a tensor or None, got {type(y).__name__}")
        wanted = config.condition
        if (y is None) != (wanted == "none"):
            came = "None" if y is None else f"a tensor of shape {list(y.shape)}"
            raise InputError(f"y: expected {'None' if wanted == 'none' else wanted + ' indices'}, got {came}")
        if y is None:
            return None, pooled
        shape: tuple[int | None, ...] = (x.shape[0],)  # (of an exported batch len(x) makes a constant)
        if wanted == "caption":
            shape = (x.shape[0], None if config.context == "pooled" else config.caption_tokens)
            if not config.vocabulary_size:
                shape = (*shape, config.caption_width)
        if y.ndim != len(shape) or any(n not in (None, m) for n, m in zip(shape, y.shape, strict=True)):
            expected = ", ".join("K" if n is None else str(n) for n in shape)
            raise InputError(f"y: expected shape [{expected}], got {list(y.shape)}")
        if (wanted == "class" or config.vocabulary_size) and y.dtype not in (torch.int64, torch.int32):
            raise InputError(f"y: expected whole numbers, int64 or int32, got {y.dtype}")
        return y, pooled


def whole_again(whole_BTD: Tensor, index_BK: Tensor | None, h_BKD: Tensor, pending: Pending | None) -> Tensor:
    """The stream of all tokens, with what was done to those that were taken out of it."""
    h_BKD = settle(h_BKD, pending)
    return h_BKD if index_BK is None else put_back(whole_BTD, index_BK, h_BKD)


def first_tokens(h_BTD: Tensor, pending: Pending | None, tokens: int) -> tuple[Tensor, Pending | None]:
    """The image's part of a stream that holds more, and of the branch that is still to be added to it."""
    if pending is not None:
        pending = pending._replace(branch=pending.branch[:, :tokens])
    return h_BTD[:, :tokens], pending
