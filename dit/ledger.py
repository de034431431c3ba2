"""The ledger's lines, the report that holds them, and how they are shown. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

OPERATIONS = (
    "matmul",
    "attention",
    "norm",
    "modulation",
    "activation",
    "embedding",
    "elementwise",
    "optimizer",
)


class LedgerLine(NamedTuple):
    """One line of the ledger, for the whole batch.

    Attributes:
        name: where in the model, such as ``blocks.attn.qkv``; blocks of a kind stand together.
        operation: one of ``OPERATIONS``.
        formula: the forward count in words; letters as in ``docs/flops.md``.
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, gradients that nobody needs left out.
        recompute: FLOPs of doing forward work again for the backward pass.
        bytes_forward, bytes_backward: compulsory traffic to memory: every operand read once, every result
            written once.
    """

    name: str
    operation: str
    formula: str
    forward: int
    backward: int
    recompute: int = 0
    bytes_forward: int = 0
    bytes_backward: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes of the forward and the backward pass."""
        return self.bytes_forward + self.bytes_backward

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return self._asdict() | {"bytes_moved": self.bytes_moved}


class ParamCount(NamedTuple):
    """Trainable parameters by how often they work; ``total`` is ``per_token + per_context + per_sample +
    embedding``.

    Attributes:
        total: all parameters; ditscale's models train all of them. A fixed position table is not one.
        per_token: work for every token of the image's stream (patches, attention, feed-forward, norms,
            output).
        per_sample: work once for every image (time, pooled condition, modulation).
        embedding: rows that are looked up (labels, words, learned positions).
        per_context: work for every token of the caption, apart from the image's (its projection, the keys and
            values of cross-attention, the caption's stream in joint blocks).
        active: ``total`` without the experts that a token is not sent to.
        body: weights of the blocks' matrix products that work for one image token, no biases: 12 L D^2 for a
            DiT.
    """

    total: int
    per_token: int
    per_sample: int
    embedding: int
    per_context: int = 0
    active: int = 0
    body: int = 0

    @property
    def trainable(self) -> int:
        """All of them: nothing that is counted here is frozen."""
        return self.total


@dataclass(frozen=True)
class FlopReport:
    """What one forward pass, backward pass and training step of a batch cost.

    Attributes:
        model: the configuration's name, or "".
        image_size: pixels: the side, or the height where ``image_width`` is not None.
        image_width: pixels, where the image is not square.
        frames: of the model's input.
        batch: images (videos).
        tokens: image tokens of one sample; of all samples where ``lengths`` packs different ones.
        context_tokens: tokens of one sample's condition; of all where they differ.
        forward, backward: FLOPs of the batch.
        recompute: FLOPs of forward work that is done again; 0 where none was asked for.
        train: what a training step costs by the convention: ``forward + backward``, and ``recompute`` under
            ``hardware``. The optimizer is not in it.
        macs_forward: multiply-adds of the forward pass's matrix products, the unit that the DiT paper calls
            Gflops.
        params: see :class:`ParamCount`.
        ledger: the lines that the sums are made of.
        extras: lines beside the model: optimizer, averaged weights, autoencoder, text encoder. In no sum but
            ``step``.
        convention: what is counted.
    """

    model: str
    image_size: int
    batch: int
    tokens: int
    forward: int
    backward: int
    train: int
    macs_forward: int
    params: ParamCount
    ledger: tuple[LedgerLine, ...]
    convention: str = "matmul"
    recompute: int = 0
    image_width: int | None = None
    frames: int = 1
    context_tokens: int = 0
    extras: tuple[LedgerLine, ...] = ()

    def __post_init__(self) -> None:
        forward = backward = recompute = 0
        for line in self.ledger:
            forward += line.forward
            backward += line.backward
            recompute += line.recompute
        if (forward, backward, recompute) != (self.forward, self.backward, self.recompute):
            raise ValueError("the ledger's lines do not add up to its sums")

    @property
    def step(self) -> int:
        """FLOPs of a whole training step: the model's, recomputed ones, and the extras."""
        return self.forward + self.backward + self.recompute + sum(x.forward + x.backward for x in self.extras)

    def line(self, name: str) -> LedgerLine:
        """The line of that name; KeyError where there is none."""
        for line in (*self.ledger, *self.extras):
            if line.name == name:
                return line
        raise KeyError(name)

    def tree(self) -> dict[str, Any]:
        """Sums by module: nested dictionaries with ``forward``, ``backward``, ``recompute`` and ``parts``."""
        root: dict[str, Any] = _node()
        for line in self.ledger:
            node = root
            for part in ("", *line.name.split(".")):
                node = node["parts"].setdefault(part, _node()) if part else node
                for field in ("forward", "backward", "recompute"):
                    node[field] += getattr(line, field)
        return root

    def by_operation(self) -> dict[str, tuple[int, int]]:
        """(forward, backward) of each operation class that occurs."""
        sums: dict[str, tuple[int, int]] = {}
        for line in self.ledger:
            forward, backward = sums.get(line.operation, (0, 0))
            sums[line.operation] = forward + line.forward, backward + line.backward
        return sums

    def to_json(self) -> dict[str, Any]:
        """Plain values, under the names that the command line prints."""
        return {
            "model": self.model,
            "image_size": self.image_size,
            "image_width": self.image_width,
            "frames": self.frames,
            "batch": self.batch,
            "tokens": self.tokens,
            "context_tokens": self.context_tokens,
            "convention": self.convention,
            "forward_flops": self.forward,
            "backward_flops": self.backward,
            "recompute_flops": self.recompute,
            "train_flops": self.train,
            "step_flops": self.step,
            "forward_macs": self.macs_forward,
            "params": self.params._asdict() | {"trainable": self.params.trainable},
            "ledger": [line.to_json() for line in self.ledger],
            "extras": [line.to_json() for line in self.extras],
        }

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """The ledger as text: line, class, formula, forward, backward, share of the training step."""
        whole = max(1, self.forward + self.backward)
        return [
            (
                line.name,
                line.operation,
                line.formula,
                f"{line.forward:,}",
                f"{line.backward:,}",
                f"{100 * (line.forward + line.backward) / whole:.2f} %",
            )
            for line in self.ledger
        ]

    @property
    def title(self) -> str:
        """Model, size, tokens and batch in a line."""
        size = f"{self.image_size}" if self.image_width is None else f"{self.image_size}x{self.image_width}"
        video = f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.model or 'model'}: {size} px{video}, {self.tokens} tokens, batch {self.batch}"

    def to_markdown(self) -> str:
        """The ledger as a Markdown table with its sums and its convention."""
        head, *body = ["| " + " | ".join(row) + " |" for row in self._table()]
        table = [head, "|---|---|---|---:|---:|---:|", *body]
        return f"{self.title}, convention `{self.convention}`\n\n" + "\n".join(table) + "\n"

    def __str__(self) -> str:
        return f"{self.title}, convention {self.convention}\n" + aligned(self._table(), right=3)

    def _table(self) -> list[tuple[str, ...]]:
        """:meth:`rows` between their headings and their sums."""
        head = ("line", "class", "formula", "forward", "backward", "share")
        total = ("total", "", f"train {self.train:,}", f"{self.forward:,}", f"{self.backward:,}", "100 %")
        return [head, *self.rows(), total]


def aligned(rows: Iterable[tuple[str, ...]], *, right: int) -> str:
    """Rows of text as columns; the last ``right`` columns are flush right."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    left = len(widths) - right
    return "\n".join(
        "  ".join(
            cell.rjust(w) if i >= left else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    )


def _node() -> dict[str, Any]:
    return {"forward": 0, "backward": 0, "recompute": 0, "parts": {}}
