"""Published laws give back the numbers that their papers print."""

from __future__ import annotations

import pytest

from ditscale.errors import InputError
from ditscale.scaling.registry import PUBLISHED, published, video_flops_per_token

CHECKS = [(law, check) for law in PUBLISHED.values() for check in law.checks]


@pytest.mark.parametrize(
    ("law", "check"), CHECKS, ids=[f"{a.name}-{c.quantity}-{i}" for i, (a, c) in enumerate(CHECKS)]
)
def test_printed_numbers(law, check) -> None:  # type: ignore[no-untyped-def]
    assert law.evaluate(check) == pytest.approx(check.value, rel=check.tolerance)


def test_liang_is_consistent_with_6nd_to_its_rounding() -> None:
    law = published("liang2024")
    for flops in (1e17, 1e21):
        best = law.optimum(flops)
        assert 6 * best["params"] * best["tokens"] / flops == pytest.approx(1.00901, abs=1e-4)
    assert law.laws["params"].digits == 1  # 0.0009: N is known to 5.6 % at best


def test_untuned_hyperparameters_ask_for_a_larger_model() -> None:
    tuned, fixed = (published(n).optimum(1e22)["params"] for n in ("yin2024-video", "yin2024-video-fixed"))
    assert 1 - tuned / fixed == pytest.approx(0.399, abs=0.003)


def test_video_tokens_cost_what_the_paper_says() -> None:
    layers, width, context = 28, 1152, 4096
    assert video_flops_per_token(16 * layers * width**2, context, width) == pytest.approx(
        84 * layers * width**2 + 12 * layers * context * width, rel=1e-12
    )


def test_besiroglu_exponent_and_movie_gen_budget() -> None:
    law = published("besiroglu2024").surface
    assert law is not None
    assert law.beta / (law.alpha + law.beta) == pytest.approx(0.5126, abs=1e-4)
    # Movie Gen's 18.05 B parameters stand at 1.06e24 FLOPs of the tuned law.
    assert published("yin2024-video").optimum(1.06e24)["params"] == pytest.approx(18.05e9, rel=0.01)


def test_a_surface_in_flops_per_token_spends_the_budget_without_a_factor_of_six() -> None:
    law = published("vonruette2025-masked")
    best = law.optimum(1e20)
    assert best["params"] * best["tokens"] == pytest.approx(1e20)
    assert law.surface is not None
    for size in (0.9, 1.1):
        assert law.surface.loss(size * best["params"], best["tokens"] / size) > best["loss"]


def test_every_law_names_its_source_and_can_be_written_down() -> None:
    for law in PUBLISHED.values():
        assert law.source and law.reading and (law.laws or law.surface)
        assert law.to_json()["name"] == law.name
        assert all(1 <= power.digits <= 10 for power in law.laws.values())
        assert law.surface is None or 2 <= law.surface.digits <= 7


def test_an_unknown_law_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean liang2024"):
        published("liang2025")
