"""What a model is told beside the time: labels and captions, as one vector of a sample or as tokens.

Shape suffixes: B batch, S tokens of the condition, D width, K caption words, W caption width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ditscale.dit.config import DiTConfig
from ditscale.dit.embed import axis_table
from ditscale.dit.layers import Linear, Mlp, hold_table
from ditscale.errors import InputError

# What a model takes beside image and time: a tensor, or several of them, by row.
Condition: TypeAlias = "Tensor | tuple[Tensor, ...] | None"


def each(condition: Condition, change: Callable[[Tensor], Tensor]) -> Condition:
    """A condition of changed tensors, such as some of their rows."""
    if condition is None:
        return None
    return change(condition) if isinstance(condition, Tensor) else tuple(change(tensor) for tensor in condition)


def looked_up(table: nn.Embedding, indices: Tensor, what: str) -> Tensor:
    """Rows of a table; on a CPU InputError where an index has none, which a GPU reports in its own way, without waiting."""
    try:
        return table(indices)
    except IndexError as error:
        raise InputError(
            f"y: expected {what} from 0 to {table.num_embeddings - 1}, got {indices.min()} to {indices.max()}"
        ) from error


class LabelEmbed(nn.Module):
    """A row for each class, and one more, the last, for "no label"."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, labels_B: Tensor, drop_B: Tensor | None) -> Tensor:
        if drop_B is not None:
            labels_B = torch.where(drop_B, self.num_classes, labels_B)
        return looked_up(self.embedding_table, labels_B, "labels")


class CaptionEmbed(nn.Module):
    """Captions brought to the model's width: the mean of the word vectors, or a token for each word or feature.

    Words are int64 [B, K], 0 where there is none. Features of a frozen text encoder are [B, S, W], rows of zeros where
    there is none. What stands behind a caption's last word is padding and never attended to; the first place always
    counts, so a dropped or empty caption is one token of word 0 (of zero features), and its projection stands for "no
    caption". Word tokens know their place by a fixed table of sines and cosines.
    """

    places: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width = config.caption_width
        self.pooled = config.context == "pooled"
        if config.vocabulary_size:
            self.embedding_table = nn.Embedding(config.vocabulary_size, width)
        self.words = config.vocabulary_size > 0
        self.length = config.caption_tokens
        self.make_tables()
        # Under the names of PixArt-alpha where there are two layers.
        if config.caption_layers == 1:
            self.proj = Linear(width, config.width)
        else:
            self.y_proj = Mlp(width, config.width, config.width)

    def make_tables(self) -> None:
        """The places of words, where they are tokens."""
        if self.words and not self.pooled:
            hold_table(self, "places", axis_table(self.embedding_table.embedding_dim, self.length).float())

    def project(self, features: Tensor) -> Tensor:
        """To the model's width."""
        return self.proj(features) if hasattr(self, "proj") else self.y_proj(features)

    def forward(self, words_BK: Tensor, drop_B: Tensor | None) -> Tensor:
        """[B, D] from words: their mean vector, projected; zero before the projection where there is no word."""
        if drop_B is not None:
            words_BK = words_BK.masked_fill(drop_B[:, None], 0)
        present_BK1 = (words_BK != 0).unsqueeze(-1).to(self.embedding_table.weight.dtype)
        total = (looked_up(self.embedding_table, words_BK, "words") * present_BK1).sum(1)
        return self.project(total / present_BK1.sum(1).clamp(min=1))

    def tokens(self, caption: Tensor, drop_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """([B, S, D], [B]): tokens, and how many of each sample count."""
        if drop_B is not None:
            caption = caption.masked_fill(drop_B.view(-1, *[1] * (caption.ndim - 1)), 0)
        present_BS = caption != 0 if self.words else (caption != 0).any(-1)
        counted = torch.arange(1, caption.shape[1] + 1, device=caption.device)
        lengths_B = (present_BS * counted).amax(1).clamp(min=1)
        if self.words:
            features = looked_up(self.embedding_table, caption, "words") + self.places
        else:
            features = caption.to(next(self.parameters()).dtype)
        return self.project(features), lengths_B
