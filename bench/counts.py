"""The ledger beside other ways to count a DiT's FLOPs: torch's own counter on the meta device. First equality, then time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ditscale.bench.rows import Row
from ditscale.bench.timing import measure

if TYPE_CHECKING:
    from ditscale.bench.runner import Session

MODELS = ("DiT-S/2", "DiT-B/2", "DiT-L/2", "DiT-XL/2")


def torch_count(name: str) -> int:
    """Training FLOPs of one image by running the plain DiT under ``FlopCounterMode`` on tensors without data."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ditscale.bench.plain_dit import PlainDiT
    from ditscale.dit.config import DiTConfig

    c = DiTConfig.preset(name)
    with torch.device("meta"):
        model = PlainDiT.of(c)
        x = torch.empty(1, c.in_channels, c.input_side, c.input_side)
        t, y = torch.empty(1), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y).sum().backward()
    return int(counter.get_total_flops())


def count_rows(session: Session) -> Iterator[Row]:
    """A row for each model and each way to count."""
    from ditscale.dit.config import DiTConfig
    from ditscale.dit.flops import count

    for name in MODELS[:1] if session.tiny else MODELS:
        if session.late:
            yield session.skipped_row("flops", f"count/{name}", "count")
            continue
        config = DiTConfig.preset(name)
        # The counter's model predicts no variance: the same is asked of the ledger.
        config = DiTConfig.from_dict({**config.to_dict(), "learn_sigma": False})
        ways: dict[str, Callable[[int], int]] = {
            "ours": lambda _, c=config: count(c).train,  # type: ignore[misc]
            "torch": lambda _, n=name: torch_count(n),  # type: ignore[misc]
        }
        found = {provider: way(0) for provider, way in ways.items()}
        timings = measure(ways, sets=1, device="cpu", protocol=session.protocol)
        for provider, timing in timings.items():
            row = session.measured_row("flops", f"count/{name}", "count", provider, timing, timings)
            yield row | {
                "label": name,
                "train_flops": found[provider],
                "agrees": found["ours"] == found["torch"],
            }
