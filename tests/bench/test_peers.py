"""Other libraries behind the same calls: adapters, with stand-ins of the libraries' signatures, do what plain PyTorch does."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ditscale.bench.cases import Case, operator_case
from ditscale.bench.operators import PLAIN, make_set, peers
from ditscale.errors import BackendUnavailable


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> None:
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(content)


class _LigerNorm:
    @staticmethod
    def apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, eps)


def _quack_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    assert x.dim() == 2
    assert weight.dtype == torch.float32
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None, eps)


def _token_major(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    assert q.shape == (2, 16, 4, 8)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _agrees(case: Case, name: str) -> None:
    inputs, _ = make_set(case, "cpu", 0)
    found = peers(case, "cuda", inputs)[name]()(*inputs)
    torch.testing.assert_close(found, PLAIN[case.op](*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["layernorm_modulate", "gate_residual_layernorm_modulate"])
@pytest.mark.parametrize("name", ["apex-like", "liger", "apex", "quack"])
def test_norms_of_others(op: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=_LigerNorm)
    norm = lambda x, width, eps: F.layer_norm(x, width, eps=eps)  # noqa: E731
    _module(monkeypatch, "apex.normalization.fused_layer_norm", fused_layer_norm=norm)
    _module(monkeypatch, "quack.rmsnorm", layernorm_fwd=_quack_norm)
    _agrees(operator_case(op, "forward", "float32", 2, 8, 32, 4), name)


@pytest.mark.parametrize("name", ["sdpa", "flash_attn", "flash_attn_3", "xformers"])
def test_attention_of_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, "flash_attn", flash_attn_func=_token_major)
    _module(monkeypatch, "flash_attn_interface", flash_attn_func=lambda *a: (_token_major(*a), None))
    _module(monkeypatch, "xformers.ops", memory_efficient_attention=_token_major)
    _agrees(operator_case("attention", "forward", "float32", 2, 16, 32, 4), name)


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    case = operator_case("attention", "forward", "float32", 2, 16, 32, 4)
    with pytest.raises(BackendUnavailable, match="flash_attn is not installed here"):
        peers(case, "cuda", make_set(case, "cpu", 0)[0])["flash_attn"]()


def test_a_processor_is_asked_for_no_gpu_library() -> None:
    case = operator_case("layernorm_modulate", "forward", "float32", 2, 8, 32, 4)
    assert set(peers(case, "cpu", make_set(case, "cpu", 0)[0])) == {"apex-like"}
