"""The study that ``ditscale demo`` carries out: small enough for two CPU cores, real enough to hold a law."""

from __future__ import annotations

from ditscale.scaling.study import StudyConfig

# What these numbers rest on stands in docs/demo.md.
_IMAGE_SIZE = 32


def demo_study(*, quick: bool = False) -> StudyConfig:
    """The demo's study; ``quick`` is the same study at a hundredth of the compute, for tests."""
    from ditscale.dit.data import emoji_vocabulary

    budgets = (1.6e10, 3.2e10, 6.4e10, 1.28e11, 2.56e11, 5.12e11) if not quick else (3e9, 1e10, 3e10)
    return StudyConfig(
        name="emoji scenes, quick" if quick else "emoji scenes",
        budgets=tuple(int(b) for b in budgets),
        target=int(budgets[-1] * 10),
        sizes=5 if not quick else 4,
        span=6.0,
        prior_coefficient=2.2,
        prior_exponent=0.395,
        widths=(8, 12, 16, 20, 24, 28, 32, 40, 48),
        head_width=8,
        depth=2,
        model={
            "image_size": _IMAGE_SIZE,
            "latent_factor": 1,
            "in_channels": 3,
            "patch": 8,
            "condition": "caption",
            "vocabulary_size": len(emoji_vocabulary()),
            "caption_width": 16,
            "learn_sigma": False,
            "mup_base_width": 64,
        },
        training={"batch": 16, "lr": 5e-3, "clip": 0.25, "prediction": "clean"},
        lr_images=32_000,
        lr_exponent=0.25,
    )
