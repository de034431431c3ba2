"""A user's mistakes are named; the choice of a backend is right, and a kernel that lies is not used."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch

from ditscale import kernels
from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import dispatch, library, selfcheck

X, ROW = torch.randn(2, 3, 8), torch.randn(2, 8)

MISTAKES = {
    "x-rank": (lambda: kernels.layernorm_modulate(X[0], ROW, ROW), "x: expected [B, T, D]"),
    "x-integer": (lambda: kernels.layernorm_modulate(X.int(), ROW, ROW), "x: expected a floating-point"),
    "x-no-tensor": (lambda: kernels.layernorm_modulate([1.0], ROW, ROW), "x: expected a tensor, got list"),
    "x-no-width": (lambda: kernels.layernorm_modulate(X[..., :0], ROW, ROW), "D >= 1"),
    "shift-width": (lambda: kernels.layernorm_modulate(X, ROW[:, :7], ROW), "shift: expected [8], [2, 8] or [2, 3, 8]"),
    "scale-batch": (lambda: kernels.layernorm_modulate(X, ROW, torch.randn(3, 8)), "scale: expected"),
    "gate-tokens": (lambda: kernels.gate_residual(X, X, torch.randn(2, 4, 8)), "gate: expected"),
    "branch-shape": (lambda: kernels.gate_residual(X, X[:, :2], ROW), "branch: expected the shape and device of x"),
    "norm": (lambda: kernels.layernorm_modulate(X, ROW, ROW, norm="batch"), "norm: expected 'layer' or 'rms'"),
    "weight": (lambda: kernels.layernorm_modulate(X, ROW, ROW, weight=torch.ones(7)), "weight: expected"),
    "device": (
        lambda: kernels.layernorm_modulate(X, ROW.to("meta"), ROW.to("meta")),
        "shift: expected a tensor on cpu",
    ),
    "gelu-bias": (lambda: kernels.bias_gelu(X, torch.ones(7)), "bias: expected [8]"),
    "backend": (lambda: kernels.layernorm_modulate(X, ROW, ROW, backend="fast"), "backend: expected one of auto"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named_in_one_line(name):
    call, words = MISTAKES[name]
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "triton", "flash_attn"])
def test_a_named_backend_that_cannot_run_says_why(name, monkeypatch):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("it can run here, but not on CPU tensors, which the next test has")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(dispatch, "_chosen", {})
    dispatch.unavailable_reason.cache_clear()
    try:
        with pytest.raises(BackendUnavailable, match=f"backend '{name}' cannot run layernorm_modulate here: .+"):
            kernels.layernorm_modulate(X, ROW, ROW, backend=name)
    finally:
        dispatch.unavailable_reason.cache_clear()


def test_float64_goes_to_the_reference():
    y = kernels.layernorm_modulate(X.double(), ROW.double(), ROW.double())
    assert y.dtype == torch.float64
    if library.missing_reason("cpu") is None:
        with pytest.raises(BackendUnavailable, match="float32, bfloat16 and float16, not float64"):
            kernels.layernorm_modulate(X.double(), ROW.double(), ROW.double(), backend="cpu")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No choice and no verdict known, and a cache of its own."""
    monkeypatch.setenv("DITSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_chosen", {})
    selfcheck.failure.cache_clear()
    yield tmp_path
    selfcheck.failure.cache_clear()


@pytest.mark.native
class TestSelfCheck:
    def test_a_right_kernel_is_chosen_and_the_verdict_kept(self, native, fresh):
        assert dispatch.resolve("layernorm_modulate", "auto", "cpu", torch.float32) == "cpu"
        kept = json.loads((fresh / "selfcheck.json").read_text())
        ((key, verdict),) = kept.items()
        assert verdict is None
        assert key.startswith("layernorm_modulate cpu float32 on ") and torch.__version__ in key

    def test_a_kept_verdict_is_believed(self, native, fresh, monkeypatch):
        dispatch.resolve("layernorm_modulate", "auto", "cpu", torch.float32)
        selfcheck.failure.cache_clear()
        monkeypatch.setattr(dispatch, "_chosen", {})
        monkeypatch.setattr(selfcheck, "compare", lambda *a: pytest.fail("checked again"))
        assert dispatch.resolve("layernorm_modulate", "auto", "cpu", torch.float32) == "cpu"

    def test_a_kernel_that_lies_is_replaced_and_it_is_said_once(self, native, fresh, monkeypatch):
        from ditscale.kernels.adaln import op

        class Lying:
            def __getattr__(self, name):
                real = getattr(torch.ops.ditscale, name)
                return lambda *a: real(*a) if name != "layernorm_modulate_bwd" else [1.01 * t for t in real(*a)]

        monkeypatch.setattr(op, "_ops", lambda backend: Lying())
        with pytest.warns(RuntimeWarning, match="cpu kernel of layernorm_modulate failed its self-check"):
            assert dispatch.resolve("layernorm_modulate", "auto", "cpu", torch.float32) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.layernorm_modulate(X, ROW, ROW)

    def test_a_kernel_that_throws_is_replaced(self, native, fresh, monkeypatch):
        from ditscale.kernels.adaln import op

        def broken(backend):
            raise RuntimeError("no kernel image is available")

        monkeypatch.setattr(op, "_ops", broken)
        with pytest.warns(RuntimeWarning, match="no kernel image"):
            assert dispatch.resolve("gate_residual", "auto", "cpu", torch.float32) == "reference"

    def test_a_cache_that_cannot_be_written_is_no_matter(self, native, fresh, monkeypatch):
        (fresh / "file").write_text("")
        monkeypatch.setenv("DITSCALE_CACHE", str(fresh / "file"))
        assert dispatch.resolve("gate_residual", "auto", "cpu", torch.float32) == "cpu"

    def test_it_neither_sees_nor_changes_the_callers_state(self, native, fresh):
        from torch.utils.flop_counter import FlopCounterMode

        state = torch.get_rng_state()
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            FlopCounterMode(display=False) as counter,
        ):
            assert dispatch.resolve("layernorm_modulate", "auto", "cpu", torch.float32) == "cpu"
        assert counter.get_total_flops() == 0
        assert torch.equal(state, torch.get_rng_state())


def test_without_the_library_auto_takes_the_reference(monkeypatch, fresh):
    monkeypatch.setattr(dispatch, "missing_reason", lambda name: f"libditscale_{name} was not built")
    dispatch.unavailable_reason.cache_clear()
    try:
        assert dispatch.resolve("layernorm_modulate", "auto", "cpu", torch.float32) == "reference"
        with pytest.raises(BackendUnavailable, match="was not built"):
            dispatch.resolve("layernorm_modulate", "cpu", "cpu", torch.float32)
    finally:
        dispatch.unavailable_reason.cache_clear()


@pytest.mark.native
@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_lesser_instruction_sets_are_right_too(native, isa, tmp_path):
    # The choice is made once a process, so the self-check of every operator runs in another one.
    import os

    code = (
        "import torch; from ditscale.kernels import library, selfcheck; print(library.cpu_isa());\n"
        "for op in ('layernorm_modulate', 'gate_residual', 'gate_residual_layernorm_modulate', 'bias_gelu'):\n"
        "    for dtype in selfcheck.TOLERANCE:\n"
        "        wrong = selfcheck.compare(op, 'cpu', dtype, 'cpu'); assert wrong is None, (op, dtype, wrong)\n"
    )
    from test_imports import child_env

    env = {**child_env(), "DITSCALE_CPU_ISA": isa, "DITSCALE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr
    if isa == "portable":
        assert done.stdout.strip() == "portable"


def test_doctor_says_what_runs_and_why_not():
    from ditscale.kernels.doctor import report

    facts = report(check=True)
    assert json.loads(json.dumps(facts)) == facts
    for op, rows in facts["operators"].items():
        assert rows["reference"]["available"], op
        for backend, row in rows.items():
            assert row["available"] or row["reason"], (op, backend)
    assert all(c["passed"] for c in facts["checks"]), [c for c in facts["checks"] if not c["passed"]]
