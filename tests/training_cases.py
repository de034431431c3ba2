"""What the tests of training share: a run small enough for milliseconds, and what of it must not depend on interruptions."""

from __future__ import annotations

from ditscale.dit import DiTConfig
from ditscale.dit.checkpoint import read_metrics
from ditscale.dit.data import emoji_vocabulary
from ditscale.dit.training import TrainConfig


def tiny(**changes):
    model = DiTConfig(
        image_size=16, latent_factor=1, in_channels=3, patch=4, width=16, depth=1, heads=2, frequency_width=16,
        condition="caption", vocabulary_size=len(emoji_vocabulary()), caption_width=8, learn_sigma=False,
        mup_base_width=16,
    )  # fmt: skip
    return TrainConfig(**{"model": model, "batch": 4, "images": 48, "evaluation_images": 8, "lr": 1e-2, **changes})


def result(record):
    """What must not depend on how often a run was stopped."""
    return {k: v for k, v in record.items() if "second" not in k and not k.endswith("_at")}


def metrics(folder):
    """The metrics, without what a clock measured."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in ("seconds", "mfu")} for row in rows]


def weights_of(folder):
    return (folder / "weights.safetensors").read_bytes()


def stop_after(steps):
    """Says yes when it is asked for the n-th time, which is once a step."""
    seen = []
    return lambda: seen.append(1) or len(seen) == steps
