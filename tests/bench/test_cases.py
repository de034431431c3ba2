"""Cases as data: their work agrees with the rooms' cost modules and with sizes worked by hand."""

from __future__ import annotations

import pytest

from ditscale.bench.cases import MODELS, block_case, cases, grid, operator_case, step_case
from ditscale.dit.config import DiTConfig
from ditscale.dit.flops import count
from ditscale.errors import InputError


def test_bytes_of_a_fused_forward_by_hand() -> None:
    # DiT-XL at B = 32, T = 256 in bfloat16: x, branch in, x_new, y out, 18.9 MB each; gate, shift and scale [32, 1152].
    (work,) = operator_case("gate_residual_layernorm_modulate", "forward", "bfloat16", 32, 256, 1152, 16).work()
    assert work.bytes_moved == 4 * 32 * 256 * 1152 * 2 + 3 * 32 * 1152 * 2
    assert work.matmul_flops == 0


def test_forward_and_backward_add_up_but_for_the_statistics() -> None:
    B, T = 4, 64
    moved = {}
    for passes in ("forward", "backward", "forward_backward"):
        (work,) = operator_case("layernorm_modulate", passes, "float32", B, T, 384, 6).work()
        moved[passes] = work.bytes_moved
    assert moved["forward_backward"] == moved["forward"] + moved["backward"] + 8 * B * T


def test_attention_flops() -> None:
    work = operator_case("attention", "forward_backward", "float32", 2, 256, 384, 6).work()
    assert sum(w.matmul_flops for w in work) == 12 * 2 * 256 * 256 * 384


def test_layers_of_a_feed_forward_are_four_widths_wide() -> None:
    (linear,) = operator_case("linear", "forward", "float32", 2, 64, 96, 4).work()
    (gelu,) = operator_case("bias_gelu", "forward", "bfloat16", 2, 64, 96, 4).work()
    assert linear.matmul_flops == 2 * 2 * 64 * 96 * 4 * 96
    assert gelu.bytes_moved == 2 * (2 * 2 * 64 + 1) * 4 * 96  # rows in and out, and the bias


def test_a_step_is_the_ledgers_training_step() -> None:
    case = step_case(4, 256, 384, 6, 12, C=4)
    config = DiTConfig.from_dict({**DiTConfig.preset("DiT-S/2").to_dict(), "num_classes": 10, "learn_sigma": False})
    assert sum(w.matmul_flops for w in case.work()) == count(config, batch=4).train


def test_a_block_is_its_matrix_products() -> None:
    B, T, D = 2, 64, 96
    products = sum(w.matmul_flops for w in block_case(B, T, D, 4).work())
    assert products == 3 * (2 * B * T * 12 * D * D + 4 * B * T * T * D + 2 * B * 6 * D * D)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("suite", ["adaln", "attention", "block", "step"])
@pytest.mark.parametrize("tiny", [False, True])
def test_every_case_has_work_and_a_name_of_its_own(device: str, suite: str, tiny: bool) -> None:
    found = cases(suite, device, tiny=tiny)
    assert len({case.id for case in found}) == len(found)
    for case in found:
        assert case.suite == suite
        assert sum(w.bytes_moved for w in case.work()) > 0


def test_the_gpu_cases_cover_all_widths_and_token_counts() -> None:
    shapes = [case.shape for case in cases("adaln", "cuda") if case.op == "gate_residual_layernorm_modulate"]
    assert {s["D"] for s in shapes} == {width for width, _ in MODELS.values()}
    assert {s["T"] for s in shapes} == {256, 1024, 4096}


def test_grid_keeps_to_its_rows() -> None:
    assert {c.shape["B"] * c.shape["T"] for c in grid("attention", "forward", "float32", rows=(2048, 8192))} == {
        2048,
        4096,
        8192,
    }


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="suite: expected one of adaln, attention, block, step, got 'all'"):
        cases("all", "cpu")
    with pytest.raises(InputError, match="T: expected a square number of tokens, got 60"):
        block_case(1, 60, 96, 4).work()
