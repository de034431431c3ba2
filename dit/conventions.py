"""The named conventions of counting, ours and the published ones, and how far each is from the exact count.
No torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any, Final

from ditscale.dit.config import DiTConfig
from ditscale.dit.ledger import FlopReport, LedgerLine
from ditscale.errors import InputError

COUNTED: Final = ("matmul", "all", "hardware")

CONVENTIONS: Final[dict[str, str]] = {
    "matmul": "matrix products, attention's among them, forward and true backward; a multiply-add is 2",
    "all": "every elementwise operation too, by the table of ditscale.dit.elementwise",
    "hardware": "matmul, and the forward work that is done again: recomputed activations, attention's scores",
    "6ND:total": "6 x parameters x image tokens (Kaplan's shorthand): charges once-an-image weights to every "
    "token, no attention",
    "6ND:body": "6 x weights of the blocks' products that work for a token x image tokens: no attention, no modulation",
    "6ND:per-token": "6 x parameters that work for every token x image tokens: no attention, no modulation",
    "6ND+attention:total": "6ND and 12 L H K T a token (PaLM, appendix B), all parameters: modulation for every token",
    "6ND+attention:body": "6ND of the body and 12 L H K T a token: no modulation, no embedders",
    "6ND+attention:per-token": "6ND of per-token parameters and 12 L H K T a token: no modulation",
    "dit_paper_macs": "the DiT paper's Gflops: multiply-adds and 1 a LayerNorm output; training three times that",
    "chinchilla_f": "Hoffmann et al., appendix F: embedding, attention with 3 a softmax score, feed-forward, "
    "output; backward twice forward; no modulation, norms or activations",
    "liang_in_context": "Liang et al., arXiv:2410.08184: 6ND with all parameters on image, text and time tokens",
}
_ALIASES = {"6ND": "6ND:total", "6ND+attention": "6ND+attention:total"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One convention beside the exact count.

    Attributes:
        convention: its name.
        forward, train: what it says; multiply-adds where the convention counts those.
        off_percent: how far ``train`` is from the exact training FLOPs.
        counts: what it counts and leaves out.
    """

    convention: str
    forward: int
    train: int
    off_percent: float
    counts: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def resolve(name: str) -> str:
    """The convention's full name; InputError where there is none such."""
    name = _ALIASES.get(name, name)
    if name not in CONVENTIONS:
        near = difflib.get_close_matches(str(name), [*CONVENTIONS, *_ALIASES], n=2, cutoff=0.3)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise InputError(f"convention: expected one of {', '.join(CONVENTIONS)}, got {name!r}{hint}")
    return name


def compare(
    config: DiTConfig,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
    *,
    frames: int | None = None,
    recompute: str | Sequence[str] = "none",
) -> list[Comparison]:
    """What every convention says of a training step, beside the exact count. Arguments as
    ``ditscale.dit.flops.count``.
    """
    from ditscale.dit.flops import count

    exact = count(config, image_size, batch, frames=frames).train
    rows = []
    for name, counts in CONVENTIONS.items():
        again = recompute if name == "hardware" else "none"  # which no other sum holds
        report = count(config, image_size, batch, frames=frames, convention=name, recompute=again)
        rows.append(Comparison(name, report.forward, report.train, 100 * (report.train / exact - 1), counts))
    return rows


def published(
    name: str,
    config: DiTConfig,
    exact: FlopReport,
    *,
    image_tokens: int,
    context_tokens: int,
    norm_elements: int,
) -> FlopReport:
    """An exact report re-counted by a published convention.

    Args:
        name: one of ``CONVENTIONS`` that is not in ``COUNTED``.
        config: the model.
        exact: its report under ``matmul``.
        image_tokens, context_tokens: of the whole batch.
        norm_elements: results of all norms, of the whole batch.
    """
    lines: list[LedgerLine] = []

    def add(line: str, operation: str, formula: str, forward: int, backward: int | None = None) -> None:
        lines.append(LedgerLine(line, operation, formula, forward, 2 * forward if backward is None else backward))

    rule, _, which = name.partition(":")
    if rule in ("6ND", "6ND+attention"):
        params = exact.params
        n = {"total": params.total, "body": params.body, "per-token": params.per_token}[which]
        add("6ND", "matmul", "2·N·T", 2 * n * image_tokens)
        if rule == "6ND+attention":
            add(
                "attention",
                "attention",
                "4·L·H·K·T²",
                sum(x.forward for x in exact.ledger if _is_attention(x)),
            )
    elif rule == "liang_in_context":
        add(
            "6ND",
            "matmul",
            "2·N·(T+S+1)",
            2 * exact.params.total * (image_tokens + context_tokens + exact.batch),
        )
    elif rule == "dit_paper_macs":
        add("macs", "matmul", "multiply-adds", exact.macs_forward)
        add("norms", "norm", "1 a result", norm_elements)
    else:
        head_width = config.width // config.heads
        for x in exact.ledger:
            if x.name == "patch_embed" or (x.name.endswith(_CHINCHILLA) and not x.name.startswith("caption.")):
                add(x.name, x.operation, x.formula, x.forward)
            if x.name.endswith(".scores"):
                add(
                    x.name.replace(".scores", ".softmax"),
                    "attention",
                    "3·L·H·T²",
                    3 * x.forward // (2 * head_width),
                )
        if config.condition == "caption" and config.vocabulary_size:
            words = 2 * exact.batch * config.caption_tokens * config.vocabulary_size * config.caption_width
            add("caption.words", "embedding", "2·B·S·V·W", words)
    forward, backward = sum(x.forward for x in lines), sum(x.backward for x in lines)
    return dataclasses.replace(
        exact,
        forward=forward,
        backward=backward,
        train=forward + backward,
        ledger=tuple(lines),
        convention=name,
    )


# The terms of Hoffmann's appendix F, by the names of the ledger's lines.
_CHINCHILLA = (
    ".qkv",
    ".q",
    ".kv",
    ".scores",
    ".values",
    ".proj",
    ".fc1",
    ".fc2",
    ".router",
    ".linear1",
    ".linear2",
    "final.linear",
)


def _is_attention(line: LedgerLine) -> bool:
    return line.name.endswith((".scores", ".values"))
