"""A user's mistakes are named; the choice of a backend is right, and a kernel that lies is not used."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ditscale import kernels
from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import dispatch, library, selfcheck

X, ROW, HEADS = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(2, 2, 3, 8)

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
    "gelu-bias-device": (
        lambda: kernels.bias_gelu(X, ROW[0].to("meta")),
        "bias: expected [8] on cpu as x, got [8] on meta",
    ),
    "x-sparse": (lambda: kernels.layernorm_modulate(X.to_sparse(), ROW, ROW), "x: expected a dense tensor"),
    "branch-complex": (
        lambda: kernels.gate_residual(X, X.to(torch.complex64), ROW),
        "branch: expected a floating-point",
    ),
    "weight-list": (
        lambda: kernels.layernorm_modulate(X, ROW, ROW, weight=[1.0]),
        "weight: expected a tensor, got list",
    ),
    "bias-device": (lambda: kernels.layernorm_modulate(X, ROW, ROW, bias=ROW[0].to("meta")), "bias: expected"),
    "eps-text": (lambda: kernels.layernorm_modulate(X, ROW, ROW, eps="1e-6"), "eps: expected a finite number"),
    "eps-nan": (lambda: kernels.layernorm_modulate(X, ROW, ROW, eps=math.nan), "eps: expected a finite number"),
    "eps-negative": (
        lambda: kernels.gate_residual_layernorm_modulate(X, X, ROW, ROW, ROW, eps=-1.0),
        "eps: expected a finite number of at least 0, got -1.0",
    ),
    "eps-huge": (lambda: kernels.layernorm_modulate(X, ROW, ROW, eps=10**400, norm="rms"), "eps: expected"),
    "backend-list": (lambda: kernels.gate_residual(X, X, ROW, backend=["cpu"]), "backend: expected a name"),
    "q-list": (lambda: kernels.attention([1.0], HEADS, HEADS), "q: expected a tensor, got list"),
    "qkv-none": (lambda: kernels.attention_qkv(None), "qkv: expected a tensor, got NoneType"),
    "q-float8": (lambda: kernels.attention(*3 * [HEADS.to(torch.float8_e4m3fn)]), "q: expected float32, bfloat16"),
    "attention-scale": (lambda: kernels.attention(HEADS, HEADS, HEADS, scale="x"), "scale: expected a finite number"),
    "attention-scale-vector": (
        lambda: kernels.attention(HEADS, HEADS, HEADS, scale=torch.ones(3)),
        "scale: expected a finite number, got a tensor of shape [3]",
    ),
    "q-weight": (lambda: kernels.qk_norm_rope(HEADS, HEADS, [1.0]), "q_weight: expected a tensor, got list"),
    "cos-numpy": (
        lambda: kernels.qk_norm_rope(HEADS, HEADS, cos=np.ones((3, 4)), sin=np.ones((3, 4))),
        "cos: expected a tensor, got ndarray",
    ),
    "sin-device": (
        lambda: kernels.qk_norm_rope(HEADS, HEADS, cos=torch.ones(3, 4), sin=torch.ones(3, 4).to("meta")),
        "sin: expected a tensor on cpu",
    ),
    "interleaved": (
        lambda: kernels.qk_norm_rope(HEADS, HEADS, interleaved="no"),
        "interleaved: expected true or false",
    ),
    "backend": (lambda: kernels.layernorm_modulate(X, ROW, ROW, backend="fast"), "backend: expected one of auto"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("before", ["first", "later"])
def test_mistakes_are_named_in_one_line(name, before, monkeypatch):
    call, words = MISTAKES[name]
    forget(monkeypatch)
    if before == "later":  # when a backend was chosen, calls take a shorter way
        kernels.layernorm_modulate(X, ROW, ROW)
        kernels.gate_residual(X, X, ROW)
        kernels.bias_gelu(X, ROW[0])
    with pytest.raises(InputError) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "triton", "flash_attn"])
def test_a_named_backend_that_cannot_run_says_why(name, monkeypatch):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("it can run here, but not on CPU tensors, which the next test has")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    forget(monkeypatch)
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


def test_later_calls_are_looked_at_like_the_first(backend):
    """What serves a kind of call is found once; what a call is given, every time."""
    x, row, F = torch.randn(2, 5, 40), torch.randn(2, 40), torch.nn.functional
    calls = {
        "layernorm_modulate": lambda shift, scale=row: kernels.layernorm_modulate(x, shift, scale, backend=backend),
        "gate_residual": lambda branch: kernels.gate_residual(x, branch, row, backend=backend),
        "bias_gelu": lambda bias: kernels.bias_gelu(x, bias, backend=backend),
    }
    for call, good in zip(calls.values(), (row, x, row[0]), strict=True):
        call(good)
    normed, each = F.layer_norm(x, (40,), eps=1e-6), torch.randn(2, 5, 40)
    for scale in (row, row[0], torch.randn(2, 80)[:, ::2]):
        want = normed * (1 + (scale[:, None] if scale.dim() == 2 else scale)) + each
        assert torch.allclose(calls["layernorm_modulate"](each, scale), want, atol=1e-5)
    shapes = {
        "layernorm_modulate": [(1, 40), (1, 1, 40), (7, 40), (2, 44), (2, 6, 40)],
        "gate_residual": [(1, 5, 40), (2, 1, 40), (2, 6, 40), (5, 40)],
        "bias_gelu": [(1,), (20,), (43,), (1, 40)],
    }
    for name, call in calls.items():
        for shape in shapes[name]:
            with pytest.raises(InputError):
                call(torch.randn(shape))


def test_later_calls_without_data_are_looked_at_too():
    """What traces with fake tensors takes the same short way, to the functions that only make shapes."""
    kernels.layernorm_modulate(X, ROW, ROW)
    kernels.gate_residual(X, X, ROW)
    kernels.gate_residual_layernorm_modulate(X, X, ROW, ROW, ROW)
    kernels.bias_gelu(X, ROW[0])
    with FakeTensorMode():
        x, row, wrong = torch.empty(2, 3, 8), torch.empty(2, 8), torch.empty(7, 5)
        assert kernels.layernorm_modulate(x, row[0], row).shape == x.shape
        for call, name in (
            (lambda: kernels.layernorm_modulate(x, wrong, wrong), "shift"),
            (lambda: kernels.gate_residual(x, torch.empty(9, 9, 9), row), "branch"),
            (lambda: kernels.gate_residual_layernorm_modulate(x, x, row, row, wrong), "scale"),
            (lambda: kernels.bias_gelu(x, torch.empty(3)), "bias"),
        ):
            with pytest.raises(InputError, match=f"{name}: expected"):
                call()


def test_fake_tensors_of_a_gpu_need_none(monkeypatch):
    """As a plan for another machine has them. Asking whether a graph is being captured would start CUDA."""
    forget(monkeypatch)
    with FakeTensorMode():
        x, row = torch.empty(2, 3, 8, device="cuda"), torch.empty(2, 8, device="cuda")
        heads = torch.empty(2, 2, 3, 8, device="cuda")
        for y in (kernels.layernorm_modulate(x, row, row), *kernels.qk_norm_rope(heads, heads)):
            assert y.device.type == "cuda"
        assert kernels.attention(heads, heads, heads).shape == heads.shape


@pytest.mark.parametrize("op", ["gate_residual", "attention"])
def test_triton_launches_where_its_tensors_are(op, monkeypatch):
    """On the current device it would meet the memory of another, and another device's stream."""
    if dispatch.unavailable_reason(op, "triton", "cpu"):
        pytest.skip("no Triton, or no interpreter")
    seen = []

    class Guard:
        def __init__(self, t):
            self.t = t

        def __enter__(self):
            seen.append(self.t.data_ptr())

        def __exit__(self, *_):
            seen.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    if op == "attention":
        kernels.attention(HEADS, HEADS, HEADS, backend="triton")
    else:
        kernels.gate_residual(X, X, ROW, backend="triton")
    assert seen == [(HEADS if op == "attention" else X).data_ptr(), "left"]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No choice and no verdict known, and a cache of its own."""
    monkeypatch.setenv("DITSCALE_CACHE", str(tmp_path))
    forget(monkeypatch)
    yield tmp_path
    selfcheck.failure.cache_clear()


def forget(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_quick", {})
    selfcheck.failure.cache_clear()


class Instead:
    """The operators of the CPU library, some of them replaced."""

    def __init__(self, **replaced):
        self.__dict__.update(replaced)

    def __getattr__(self, name):
        return getattr(torch.ops.ditscale, name)


def wrong_backward(*args):
    return [1.01 * t for t in torch.ops.ditscale.layernorm_modulate_bwd(*args)]


def no_image(*args):
    raise RuntimeError("no kernel image is available")


def resolve(op="layernorm_modulate", dtype=torch.float32):
    return dispatch.resolve(op, "auto", "cpu", dtype)


@pytest.mark.native
class TestSelfCheck:
    def test_a_right_kernel_is_chosen_and_the_verdict_kept(self, native, fresh):
        assert resolve() == "cpu"
        kept = json.loads((fresh / "selfcheck.json").read_text())
        ((key, verdict),) = kept.items()
        assert verdict is None
        assert key.startswith("layernorm_modulate cpu float32 on ") and torch.__version__ in key

    def test_a_kept_verdict_is_believed(self, native, fresh, monkeypatch):
        resolve()
        forget(monkeypatch)
        monkeypatch.setattr(selfcheck, "compare", lambda *a: pytest.fail("checked again"))
        assert resolve() == "cpu"

    def test_a_verdict_of_another_build_is_not_believed(self, native, fresh, monkeypatch):
        resolve()
        (key,) = json.loads((fresh / "selfcheck.json").read_text())
        (fresh / "selfcheck.json").write_text(json.dumps({f"{key[:-1]}!": "wrong once"}))
        forget(monkeypatch)
        assert resolve() == "cpu"
        assert len(json.loads((fresh / "selfcheck.json").read_text())) == 2

    def test_a_kernel_that_lies_is_replaced_and_it_is_said_once(self, native, fresh, monkeypatch):
        monkeypatch.setitem(dispatch._eager, "cpu", Instead(layernorm_modulate_bwd=wrong_backward))
        with pytest.warns(RuntimeWarning, match="cpu kernel of layernorm_modulate failed its self-check"):
            assert resolve() == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kernels.layernorm_modulate(X, ROW, ROW)
        (verdict,) = json.loads((fresh / "selfcheck.json").read_text()).values()
        assert "result 1 at shape" in verdict and "is off by" in verdict

    @pytest.mark.parametrize(
        ("operator", "dtype", "lies"),
        [
            ("attention_fwd", "float32", lambda q, *_: q.shape[2] > 128),  # where tiles follow each other
            ("attention_bwd", "float32", lambda dout, *_: dout.shape[3] == 128),  # a width with a kernel of its own
            ("layernorm_modulate_infer", "float32", lambda x, shift, *_: shift.dim() == 3),  # one a token
            ("gate_residual_layernorm_modulate_bwd", "float32", lambda dy, *_: dy.shape[2] > 8192),
            ("layernorm_modulate_infer", "float32", lambda *a: a[-1] is True),  # rms
            ("layernorm_modulate_fwd", "float32", lambda *a: a[-1] is True),
            ("gate_residual_layernorm_modulate_bwd", "bfloat16", lambda *a: a[-1] is True),
            ("layernorm_modulate_bwd", "float32", lambda dy, x, scale, *_: scale.dim() == 1),  # one for all
            ("gate_residual_fwd", "float16", lambda x, branch, gate: gate.dim() == 1),
            ("gate_residual_bwd", "bfloat16", lambda dout, branch, gate: gate.dtype != dout.dtype),
            ("layernorm_modulate_infer", "bfloat16", lambda x, shift, *a: shift.dtype != x.dtype and a[-1] is not True),
            ("bias_gelu_bwd", "float16", lambda dy, x, bias: bias.dtype != x.dtype),
            ("qk_norm_rope_fwd", "bfloat16", lambda x, *_: x.shape[3] == 64),  # as the heads of most models
            ("qk_norm_rope_bwd", "float32", lambda *a: a[6] == 0),  # norm="none"
        ],
    )
    def test_a_kernel_that_lies_somewhere_is_found(self, native, monkeypatch, operator, dtype, lies):
        op, dtype = operator.rpartition("_")[0], getattr(torch, dtype)
        right = getattr(torch.ops.ditscale, operator)

        def wrong(*args):
            found = right(*args)
            if not lies(*args):
                return found
            return 1.1 * found if isinstance(found, torch.Tensor) else [1.1 * t for t in found]

        assert selfcheck.compare(op, "cpu", dtype, "cpu") is None
        monkeypatch.setitem(dispatch._eager, "cpu", Instead(**{operator: wrong}))
        forget(monkeypatch)
        assert "is off by" in selfcheck.compare(op, "cpu", dtype, "cpu")

    def test_every_kind_of_gpu_in_the_machine_is_asked(self, fresh, monkeypatch):
        kinds = [("H200", 9, 0), ("H200", 9, 0), ("A100", 8, 0)]
        asked = []

        def compare(op, backend, dtype, device, index):
            asked.append(index)
            return "wrong" if index == 2 else None

        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(kinds))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda i: types.SimpleNamespace(**dict(zip(("name", "major", "minor"), kinds[i], strict=True))),
        )
        monkeypatch.setattr(selfcheck, "compare", compare)
        selfcheck._where.cache_clear()
        assert selfcheck.check("bias_gelu", "triton", torch.float32, "cuda") == "wrong"
        assert selfcheck.check("bias_gelu", "triton", torch.float32, "cuda") == "wrong"
        assert asked == [0, 2]  # a kind once, and kept for both
        assert len(selfcheck._read()) == 2
        # Of a kind the one that asks, or the current one: every process of a machine would else have a context on the first.
        monkeypatch.setattr(selfcheck, "_read", dict)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        selfcheck.check("bias_gelu", "triton", torch.float32, "cuda")
        selfcheck.check("bias_gelu", "triton", torch.float32, "cuda", first=2)
        assert asked == [0, 2, 1, 2, 2]
        monkeypatch.setattr(selfcheck, "check", lambda *_, first: asked.append(first) or "wrong")
        monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
        forget(monkeypatch)
        with FakeTensorMode(), pytest.warns(RuntimeWarning, match="failed its self-check on cuda"):
            kernels.bias_gelu(torch.empty(2, 3, 8, device="cuda:1"), torch.empty(8, device="cuda:1"))
        assert set(asked[5:]) == {1}
        selfcheck._where.cache_clear()

    def test_a_verdict_holds_for_the_sources_of_every_triton_kernel(self):
        names = {f"{path.parent.name}/{path.name}" for path in selfcheck._sources("triton")}
        assert {"kernels/selfcheck.py", "attn/triton_configs.py", "adaln/triton_kernels.py"} <= names

    def test_doctor_takes_a_verdict_back(self, native, fresh, monkeypatch):
        with monkeypatch.context() as lying:
            lying.setitem(dispatch._eager, "cpu", Instead(layernorm_modulate_bwd=wrong_backward))
            with pytest.warns(RuntimeWarning):
                assert resolve() == "reference"
        forget(monkeypatch)
        assert selfcheck.check("layernorm_modulate", "cpu", torch.float32, "cpu", again=True) is None
        assert resolve() == "cpu"

    def test_a_kernel_that_throws_is_replaced_but_not_for_good(self, native, fresh, monkeypatch):
        with monkeypatch.context() as broken:
            broken.setitem(dispatch._eager, "cpu", Instead(gate_residual_fwd=no_image))
            with pytest.warns(RuntimeWarning, match="it threw RuntimeError: no kernel image"):
                assert resolve("gate_residual") == "reference"
        forget(monkeypatch)  # what was thrown may have been of the moment
        assert resolve("gate_residual") == "cpu"

    def test_a_kernel_that_breaks_the_device_is_not_tried_again(self, native, fresh, monkeypatch):
        monkeypatch.setitem(dispatch._eager, "cpu", Instead(gate_residual_fwd=no_image))
        monkeypatch.setattr(selfcheck, "context_is_lost", lambda *device: True)
        with pytest.warns(RuntimeWarning, match="it broke the device's context: RuntimeError: no kernel image"):
            assert resolve("gate_residual") == "reference"
        assert len(json.loads((fresh / "selfcheck.json").read_text())) == 1  # the next process knows

    def test_a_cache_that_cannot_be_used_is_no_matter(self, native, fresh, monkeypatch):
        (fresh / "file").write_text("")
        monkeypatch.setenv("DITSCALE_CACHE", str(fresh / "file"))  # no folder can be made there
        assert resolve() == "cpu"
        monkeypatch.setenv("DITSCALE_CACHE", str(fresh))
        for content in ("", "[1]", "not json", '{"a": '):
            (fresh / "selfcheck.json").write_text(content)
            forget(monkeypatch)
            assert resolve() == "cpu"
            assert len(json.loads((fresh / "selfcheck.json").read_text())) == 1

        def homeless():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("DITSCALE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(selfcheck.Path, "home", homeless)
        forget(monkeypatch)
        assert resolve() == "cpu"

    def test_many_write_at_once(self, fresh):
        # Whatever is lost of what they write, the file is whole at every moment and nothing else is left in the folder.
        def write(k):
            for i in range(40):
                selfcheck._write(f"{k} {i}", None)
                assert selfcheck._read()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(write, range(4)))
        assert [f.name for f in fresh.iterdir()] == ["selfcheck.json"]
        assert {k.split()[1] for k in selfcheck._read()} >= {"39"}

    def test_it_neither_sees_nor_changes_the_callers_state(self, native, fresh):
        from torch.utils.flop_counter import FlopCounterMode

        saved = []
        state = torch.get_rng_state()
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t),
            FlopCounterMode(display=False) as counter,
        ):
            assert resolve() == "cpu"
        assert counter.get_total_flops() == 0 and not saved
        assert torch.equal(state, torch.get_rng_state())

    def test_inside_a_transform_nothing_is_chosen(self, native, fresh):
        torch.func.vmap(lambda x: kernels.layernorm_modulate(x, ROW, ROW))(X.expand(2, 2, 3, 8))
        assert not dispatch._chosen and not (fresh / "selfcheck.json").exists()


class TestLibrary:
    """Why a library cannot be used is one line, whatever is wrong with it; nothing ends the process."""

    def reason(self, monkeypatch, path):
        monkeypatch.setattr(library, "path_of", lambda name: path)
        monkeypatch.setattr(torch._C, "_dispatch_get_all_op_names", list)
        return library.missing_reason.__wrapped__("cpu")

    def test_not_built(self, monkeypatch, tmp_path):
        assert "was not built" in self.reason(monkeypatch, tmp_path / "libditscale_cpu.so")

    def test_no_library_at_all(self, monkeypatch, tmp_path):
        path = tmp_path / "libditscale_cpu.so"
        path.write_bytes(b"text")
        monkeypatch.setattr(library, "_stale_reason", lambda *a: None)
        assert re.fullmatch(r"libditscale_cpu\.so does not load: [^\n]+", self.reason(monkeypatch, path))

    def test_an_old_torch(self, monkeypatch, tmp_path):
        path = tmp_path / "libditscale_cpu.so"
        path.write_bytes(b"")
        monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
        assert self.reason(monkeypatch, path) == "libditscale_cpu.so needs torch 2.10 or newer, this is 2.9.1+cu128"

    @pytest.mark.native
    def test_built_from_other_sources(self, native, monkeypatch, tmp_path):
        real = library.path_of("cpu")
        assert library._stale_reason(real, library._HERE / "csrc" / "bindings" / "schemas.cpp") is None
        path = tmp_path / "libditscale_cpu.so"
        path.write_bytes(
            real.read_bytes().replace(b"gate_residual_bwd(Tensor dout,", b"gate_residual_bwd(Tensor grad,")
        )
        if (library._HERE / "csrc").is_dir():
            assert "built from other sources (gate_residual_bwd" in self.reason(monkeypatch, path)

    @pytest.mark.native
    def test_another_library_has_the_names(self, native, monkeypatch, tmp_path):
        path = tmp_path / "libditscale_cpu.so"
        path.write_bytes(library.path_of("cpu").read_bytes())
        monkeypatch.setattr(library, "path_of", lambda name: path)
        assert "another library has defined operators" in library.missing_reason.__wrapped__("cpu")


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
def test_lesser_instruction_sets_are_right_too(lesser_isa, tmp_path):
    # Tests of values, widths, strides and large calls.
    from test_imports import child_env

    here = Path(__file__).parent
    files = [str(here / f"test_{name}.py") for name in ("adaln_values", "adaln_fuzz", "adaln_edges", "gelu")]
    values = "values_and_gradients and (vector-and-tail or two-chunks or dit-s)"
    which = f"cpu and ({values}) or random_calls and cpu-1 or cpu and (wide_rows or strided_rows) or past_the_caches or 16_bits"
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", which, *files]
    code = (
        "import sys, pytest; from ditscale.kernels import library; print(library.cpu_isa(), flush=True)\n"
        f"sys.exit(pytest.main({arguments!r}))"
    )
    env = {**child_env(), "DITSCALE_CPU_ISA": lesser_isa, "DITSCALE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=here.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    ran = re.match(r"(\w+)\n(?s:.*?)(\d+) passed", done.stdout)
    assert ran and int(ran[2]) > 40, done.stdout[-1000:]
    assert ran[1] == lesser_isa


def test_doctor_says_what_runs_and_why_not(monkeypatch, fresh):
    from ditscale.kernels.doctor import report

    monkeypatch.setenv("TRITON_INTERPRET", "0")  # every kernel in the interpreter would take its time: others test it
    dispatch.unavailable_reason.cache_clear()
    try:
        facts = report(check=True)
    finally:
        dispatch.unavailable_reason.cache_clear()
    assert json.loads(json.dumps(facts)) == facts
    for op, rows in facts["operators"].items():
        assert rows["reference"]["available"], op
        for backend, row in rows.items():
            assert row["available"] or row["reason"], (op, backend)
    assert all(c["passed"] for c in facts["checks"]), [c for c in facts["checks"] if not c["passed"]]
