"""The adapters to FlashAttention 2, 3, 4 and xFormers, against stand-ins that know only how those libraries are called.

Neither library runs without a GPU. A stand-in has the signatures of its library (read in flash_attn_interface.py of versions 2
and 3, flash_attn/cute/interface.py and xformers/ops/fmha/__init__.py), refuses what that would refuse, and computes in float64.
What a GPU must still show is the libraries' own arithmetic.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from attention_cases import make
from torch import Tensor

from ditscale import kernels
from ditscale.errors import BackendUnavailable
from ditscale.kernels import dispatch
from ditscale.kernels.attn import adapters


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    """[T, H, K] by [S, H_kv, K], bias [H, T, S]; zeros where there is no key."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    if k.shape[0] == 0:
        return torch.zeros_like(q)
    scores = torch.einsum("thk,shk->hts", q.double(), k.double()) * scale + bias
    return torch.einsum("hts,shk->thk", scores.softmax(-1), v.double()).to(q.dtype)


class Flash:
    """A module of FlashAttention; ``calls`` has the names of what was called and its keyword arguments."""

    def __init__(self, version: int, pair: bool = False):
        self.calls: list[tuple[str, dict]] = []
        self.pair = pair  # results come with their log-sum-exp
        last = {2: ("dropout_p",), 3: ("qv", "num_splits"), 4: ("learnable_sink", "mask_mod")}[version]
        self.known = {"softmax_scale", "causal", "window_size", "softcap", "deterministic", *last}

    def _note(self, name, options):
        self.calls.append((name, options))
        assert set(options) <= self.known, options

    def _result(self, out):
        return (out, torch.zeros(())) if self.pair else out

    def flash_attn_func(self, q, k, v, **options):
        self._note("flash_attn_func", options)
        for t in (q, k, v):  # [B, T, H, K], rows dense
            assert t.dim() == 4 and t.stride(-1) == 1 and t.dtype in (torch.bfloat16, torch.float16)
        assert k.shape == v.shape and k.shape[0] == q.shape[0] and q.shape[2] % k.shape[2] == 0
        rows = [softmax_rows(*one, options["softmax_scale"]) for one in zip(q, k, v, strict=True)]
        return self._result(torch.stack(rows))

    def flash_attn_varlen_func(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        self._note("flash_attn_varlen_func", options)
        for t in (q, k, v):  # [tokens, H, K]
            assert t.dim() == 3 and t.stride(-1) == 1
        for cu, most, rows in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert cu.dtype == torch.int32 and cu.dim() == 1 and int(cu[0]) == 0 and int(cu[-1]) <= rows.shape[0]
            assert isinstance(most, int) and most >= int(cu.diff().max())
        out = torch.full_like(q, float("nan"))  # rows of no sequence are nobody's to write
        ends = zip(*(cu.tolist() for cu in (cu_seqlens_q, cu_seqlens_k)), strict=True)
        a, b = next(ends)
        for c, d in ends:
            out[a:c] = softmax_rows(q[a:c], k[b:d], v[b:d], options["softmax_scale"])
            a, b = c, d
        return self._result(out)


class BlockDiagonal:
    def __init__(self, q_lengths, k_lengths):
        self.q_lengths, self.k_lengths = list(q_lengths), list(k_lengths)

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None):
        return cls(q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen)


class Xformers:
    """``xformers.ops``."""

    def __init__(self):
        self.biases: list[object] = []
        self.fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonal)

    def memory_efficient_attention(self, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        self.biases.append(attn_bias)
        assert p == 0.0 and op is None
        for t in (query, key, value):  # [B, T, H, K], as many heads each
            assert t.dim() == 4 and t.stride(-1) == 1 and t.shape[2] == query.shape[2]
        if isinstance(attn_bias, BlockDiagonal):
            assert query.shape[0] == 1  # sequences of a packed batch have the one sample for themselves
            assert sum(attn_bias.q_lengths) == query.shape[1] and sum(attn_bias.k_lengths) == key.shape[1]
            parts = [
                t[0].split(n)
                for t, n in ((query, attn_bias.q_lengths), *((t, attn_bias.k_lengths) for t in (key, value)))
            ]
            return torch.cat([softmax_rows(*one, scale) for one in zip(*parts, strict=True)])[None]
        bias: list = [0.0] * query.shape[0]
        if attn_bias is not None:
            B, T, H, _ = query.shape
            assert attn_bias.shape == (B, H, T, key.shape[1]) and attn_bias.dtype == query.dtype
            assert attn_bias.stride(1) % 8 == 0 or H == 1  # rows of memory are whole eights wide
            bias = list(attn_bias.double())
        return torch.stack([softmax_rows(*one, scale, b) for *one, b in zip(query, key, value, bias, strict=True)])


@pytest.fixture
def install(monkeypatch):
    """Puts a stand-in where its library would be imported from, on a machine that has a GPU for it."""

    def put(name, module, version=2):
        caches = (adapters.missing, adapters._flash, dispatch.unavailable_reason)
        for cache in caches:
            cache.cache_clear()
        monkeypatch.setattr(adapters, "_flash_order", lambda: (version,))
        monkeypatch.setattr(dispatch, "_chosen", {})
        monkeypatch.setattr(adapters, "missing", lambda *_: None)
        path = {"xformers": "xformers.ops", "flash_attn": adapters._FLASH[version]}[name]
        for k in range(path.count(".")):
            monkeypatch.setitem(sys.modules, ".".join(path.split(".")[: k + 1]), ModuleType(path))
        monkeypatch.setitem(sys.modules, path, module)
        return module

    yield put
    adapters._flash.cache_clear()
    dispatch.unavailable_reason.cache_clear()


def close(call, backend, names=("out", "dq", "dk", "dv")):
    got, want = call.run(backend), call.run("reference")
    for name in names:
        top = want[name].double().abs().max().item()
        # Both round float64 or float32 to the dtype once, the gradients through one more tensor of it.
        torch.testing.assert_close(got[name].double(), want[name].double(), rtol=0.02, atol=0.02 * max(top, 1e-3))


CALLS = {
    "plain": lambda dtype: make(2, 4, 9, 8, dtype),
    "grouped": lambda dtype: make(2, 4, 9, 8, dtype, S=13, H_kv=2),
    "lengths": lambda dtype: make(3, 2, 9, 8, dtype, S=11, lengths=[4, 0, 11]),
    "packed": lambda dtype: make(1, 2, 20, 8, dtype, cu=([0, 7, 7, 20], [0, 7, 7, 20])),
}


@pytest.mark.parametrize("pair", [False, True], ids=["out", "with-lse"])
@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("kind", CALLS)
def test_flash_attention(install, version, kind, pair):
    module = install("flash_attn", Flash(version, pair), version)
    close(CALLS[kind](torch.bfloat16), "flash_attn")
    (name, options), *more = module.calls
    assert not more
    assert name == ("flash_attn_func" if kind in ("plain", "grouped") else "flash_attn_varlen_func")
    assert options["softmax_scale"] == pytest.approx(8**-0.5) and "deterministic" not in options


def test_flash_attention_with_a_scale_determinism_and_rows_behind_the_last_sequence(install):
    module = install("flash_attn", Flash(2))
    call = make(1, 2, 20, 8, torch.float16, cu=([0, 7, 15], [0, 7, 15]))
    torch.use_deterministic_algorithms(True)
    try:
        out = kernels.attention(call.q, call.k, call.v, scale=0.5, cu_seqlens=call.cu[0], backend="flash_attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert module.calls[0][1] == {"softmax_scale": 0.5, "deterministic": True}
    assert not out[:, :, 15:].any() and out[:, :, :15].abs().min() > 0


def test_flash_attention_says_what_it_does_not_take(install):
    install("flash_attn", Flash(3), 3)
    with pytest.raises(BackendUnavailable, match="takes bfloat16 and float16, not float32"):
        make(1, 2, 9, 8).run("flash_attn")
    with pytest.raises(BackendUnavailable, match="no bias or mask of keys"):
        make(1, 2, 9, 8, torch.bfloat16, key_bias="mask").run("flash_attn")


@pytest.mark.parametrize("kind", CALLS)
def test_xformers(install, kind):
    module = install("xformers", Xformers())
    close(CALLS[kind](torch.float32), "xformers")
    (bias,) = module.biases
    assert type(bias) is {"lengths": Tensor, "packed": BlockDiagonal}.get(kind, type(None))


@pytest.mark.parametrize("bias", ["head", "mask"])
def test_xformers_with_a_bias(install, bias):
    install("xformers", Xformers())
    call = make(2, 4, 9, 8, S=11, H_kv=2, lengths=[4, 11], key_bias=bias)
    close(call, "xformers")


def test_xformers_says_what_it_does_not_take(install):
    install("xformers", Xformers())
    with pytest.raises(BackendUnavailable, match="every token in a sequence"):
        make(1, 2, 20, 8, cu=([0, 7, 15], [0, 7, 15])).run("xformers")
    with pytest.raises(BackendUnavailable, match="no bias of keys beside packed"):
        make(1, 2, 20, 8, cu=([0, 7, 20], [0, 7, 20]), key_bias="shared").run("xformers")


def test_the_newest_version_for_a_gpu_is_taken(monkeypatch):
    found = {}
    for capability, there in (
        ((9, 0), (2, 3, 4)),
        ((9, 0), (2, 4)),
        ((10, 0), (2, 3, 4)),
        ((8, 0), (2, 3, 4)),
        ((12, 0), (2,)),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        modules = {adapters._FLASH[v] for v in there}
        monkeypatch.setattr(adapters, "_import_error", lambda name, m=modules: None if name in m else f"no {name}")
        monkeypatch.setattr(adapters.importlib, "import_module", lambda name: name)
        adapters._flash.cache_clear()
        found[capability, there] = adapters._flash()
    adapters._flash.cache_clear()
    assert list(found.values()) == [
        (3, "flash_attn_interface"), (4, "flash_attn.cute"), (4, "flash_attn.cute"), (2, "flash_attn"), (2, "flash_attn")
    ]  # fmt: skip


def test_reasons_when_they_are_absent(monkeypatch):
    for name in ("flash_attn", "flash_attn_interface", "flash_attn.cute", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it raises
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    adapters.missing.cache_clear()
    try:
        reason = adapters.missing("flash_attn", "cuda")
        assert reason is not None
        for version, module in adapters._FLASH.items():
            assert f"version {version}: {module} does not import (" in reason
        assert adapters.missing("xformers", "cuda").startswith("xformers.ops does not import (")
        for name in ("flash_attn", "xformers"):
            assert adapters.missing(name, "cpu") == "it serves CUDA tensors, not cpu"
            with pytest.raises(BackendUnavailable, match="it serves CUDA tensors, not cpu"):
                make(1, 2, 9, 8).run(name)
        assert adapters.missing("sdpa", "cpu") is None
    finally:
        adapters.missing.cache_clear()


def masked_in_units_of_log_2(q, k, v, attn_mask=None, scale=None, enable_gqa=False):
    """As PyTorch's memory-efficient kernel: a mask in the dtype of q, and NaN for a row whose every score is at -infinity."""
    assert attn_mask.dtype == q.dtype
    scores = (q.float() @ k.float().transpose(-1, -2) * scale + attn_mask.float()) * 1.4426950408889634
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True) @ v.float()).to(q.dtype)


@pytest.mark.parametrize("backend", ["sdpa", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_finite_masks_over_every_key_stay_finite_in_the_dtype_of_q(install, monkeypatch, dtype, backend):
    """github.com/pytorch/pytorch/issues/110213: PyTorch's kernels for GPUs make NaN of a whole row of the least number."""
    install("xformers", Xformers())
    monkeypatch.setattr(adapters, "_takes_wide_masks", lambda device: False)
    monkeypatch.setattr(adapters.F, "scaled_dot_product_attention", masked_in_units_of_log_2)
    call = make(4, 2, 9, 8, dtype)
    least = torch.finfo(torch.float32).min
    bias = torch.zeros(4, 9)
    bias[0], bias[1, 3:], bias[2], bias[3, 2:] = least, least, -1e9, float("-inf")
    bias.requires_grad_()
    got, want = (
        kernels.attention(call.q, call.k, call.v, key_bias=bias, backend=name) for name in (backend, "reference")
    )
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[[1, 3]], want[[1, 3]], rtol=0.02, atol=0.02)
    grads = [torch.autograd.grad(out.float().square().sum(), bias)[0] for out in (got, want)]
    assert torch.isfinite(grads[0]).all()
    torch.testing.assert_close(grads[0][[1, 3]], grads[1][[1, 3]], rtol=0.05, atol=0.05)
