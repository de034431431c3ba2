"""The operator cases: inputs as a model makes them, plain PyTorch, our functions per backend, and installed peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditscale import kernels
from ditscale.bench.cases import ATTENTION_OPS, Case
from ditscale.bench.subjects import DTYPES, Candidate, Results, Subject, buffer_sets, fresh_compile, generator
from ditscale.errors import BackendUnavailable
from ditscale.kernels import dispatch

Function = Callable[..., Any]
Set = tuple[list[Tensor], list[Tensor]]  # leaves, cotangents

LEAVES = {
    "layernorm_modulate": ("x", "shift", "scale"),
    "gate_residual": ("x", "branch", "gate"),
    "gate_residual_layernorm_modulate": ("x", "branch", "gate", "shift", "scale"),
    "bias_gelu": ("x", "bias"),
    "qk_norm_rope": ("q", "k", "q_weight", "k_weight"),
    "attention": ("q", "k", "v"),
    "linear": ("x", "weight", "bias"),
}  # what gradients are taken of; further inputs (the tables of angles) are constants


def make_set(case: Case, device: str, seed: int) -> Set:
    """Inputs of one call and the gradients that come in from above.

    Modulations are chunks of one [B, 6 D] tensor and q, k, v views of one projection, as in a DiT.
    """
    g = generator(seed, device)
    dtype = DTYPES[case.dtype]
    s = case.shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    if case.op in ATTENTION_OPS:
        B, H, T, K = (s[k] for k in "BHTK")
        q, k, v = draw(B, T, 3, H, K).permute(2, 0, 3, 1, 4).unbind(0)
        if case.op == "attention":
            return [q, k, v], [draw(B, T, H, K).transpose(1, 2)]
        angles = torch.arange(T, device=device)[:, None] * 0.01 ** (torch.arange(K // 2, device=device) / K)
        return [q, k, draw(K), draw(K), angles.cos().to(dtype), angles.sin().to(dtype)], [
            draw(B, H, T, K),
            draw(B, H, T, K),
        ]
    if case.op == "bias_gelu":
        return [draw(s["B"] * s["T"], s["F"]), draw(s["F"])], [draw(s["B"] * s["T"], s["F"])]
    B, T, D = s["B"], s["T"], s["D"]
    if case.op == "linear":
        width = s["F"]
        return [draw(B, T, D), draw(width, D) * D**-0.5, draw(width)], [draw(B, T, width)]
    parts = dict(zip(("shift", "scale", "gate"), draw(B, 6 * D).chunk(6, dim=1), strict=False))
    values = {"x": draw(B, T, D), "branch": draw(B, T, D), **parts}
    outputs = 2 if case.op == "gate_residual_layernorm_modulate" else 1
    return [values[name] for name in LEAVES[case.op]], [draw(B, T, D) for _ in range(outputs)]


def _layernorm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _gate_residual(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * branch


def _fused(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = _gate_residual(x, branch, gate)
    return x, _layernorm_modulate(x, shift, scale)


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh")


def _qk_norm_rope(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def one(a: Tensor, w: Tensor) -> Tensor:
        first, second = F.rms_norm(a, (a.shape[-1],), w, 1e-6).chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    return one(q, wq), one(k, wk)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


PLAIN: dict[str, Function] = {
    "layernorm_modulate": _layernorm_modulate,
    "gate_residual": _gate_residual,
    "gate_residual_layernorm_modulate": _fused,
    "bias_gelu": _bias_gelu,
    "qk_norm_rope": _qk_norm_rope,
    "attention": _attention,
    "linear": F.linear,
}


def _apex_like(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """A fused norm and one fused line of modulation: two kernels, as with apex or any library of norms."""
    return torch.addcmul(shift.unsqueeze(1), F.layer_norm(x, (x.shape[-1],), eps=1e-6), 1 + scale.unsqueeze(1))


def _apex_like_fused(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.addcmul(x, gate.unsqueeze(1), branch)
    return x, _apex_like(x, shift, scale)


def _with_norm(norm: Callable[[Tensor], Tensor]) -> dict[str, Function]:
    """The modulated operators with another library's LayerNorm, and PyTorch for the rest of the line."""

    def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def fused(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        x = _gate_residual(x, branch, gate)
        return x, modulate(x, shift, scale)

    return {"layernorm_modulate": modulate, "gate_residual_layernorm_modulate": fused}


def _ones(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones(x.shape[-1], device=x.device, dtype=x.dtype), torch.zeros(
        x.shape[-1], device=x.device, dtype=x.dtype
    )


def _peer(module: str, make: Callable[[Any], Function]) -> Callable[[], Function]:
    def build() -> Function:
        try:
            return make(importlib.import_module(module))
        except ImportError as error:
            raise BackendUnavailable(f"{module} is not installed here ({error})") from error

    return build


def peers(case: Case, device: str, leaves: Sequence[Tensor]) -> dict[str, Callable[[], Function]]:
    """Other libraries' ways to do the same, by provider name. What is not installed says so when it is built."""
    if case.op == "attention":
        found = {"sdpa": _peer("torch", lambda _: F.scaled_dot_product_attention)}
        if device == "cuda":
            names = {
                "sdpa-flash": SDPBackend.FLASH_ATTENTION,
                "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
                "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
            }
            found |= {name: (lambda b=b: _sdpa(b)) for name, b in names.items()}  # type: ignore[misc]
            found["flash_attn"] = _peer("flash_attn", lambda m: _token_major(m.flash_attn_func))
            found["flash_attn_3"] = _peer("flash_attn_interface", lambda m: _token_major(m.flash_attn_func))
            found["xformers"] = _peer("xformers.ops", lambda m: _token_major(m.memory_efficient_attention))
        return found
    if case.op not in ("layernorm_modulate", "gate_residual_layernorm_modulate"):
        return {}
    plain: Function = _apex_like if case.op == "layernorm_modulate" else _apex_like_fused
    always: dict[str, Callable[[], Function]] = {"apex-like": lambda: plain}
    if device != "cuda":
        return always
    weight, bias = _ones(leaves[0])
    width = (leaves[0].shape[-1],)
    makers: dict[str, tuple[str, Callable[[Any], Callable[[Tensor], Tensor]]]] = {
        "liger": (
            "liger_kernel.ops.layer_norm",
            lambda m: lambda x: m.LigerLayerNormFunction.apply(x, weight, bias, 1e-6),
        ),
        "apex": (
            "apex.normalization.fused_layer_norm",
            lambda m: lambda x: m.fused_layer_norm(x, width, 1e-6),
        ),
        "quack": (
            "quack.rmsnorm",
            # Its newest releases have the backward pass too.
            lambda m: _rows_of(getattr(m, "layernorm", None) or m.layernorm_fwd, weight.float()),
        ),
    }
    return always | {
        name: _peer(module, lambda m, make=make: _with_norm(make(m))[case.op])  # type: ignore[misc]
        for name, (module, make) in makers.items()
    }


def _sdpa(backend: SDPBackend) -> Function:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def _token_major(function: Function) -> Function:
    """For libraries that take [B, T, H, K]; some give statistics beside the output."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = function(*(t.transpose(1, 2) for t in (q, k, v)))
        return (found[0] if isinstance(found, tuple) else found).transpose(1, 2)

    return call


def _rows_of(norm: Function, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """For norms that take [rows, D] and a float32 weight."""
    return lambda x: norm(x.reshape(-1, x.shape[-1]), weight, eps=1e-6).view_as(x)


# What "auto" takes hangs on the shape too, or may be none of the backends named below.
_BY_SHAPE = ("attention", "linear")


def operator_subject(case: Case, device: str, most_sets: int = 512) -> Subject:
    """The candidates of an operator case."""
    first = make_set(case, device, 0)
    set_bytes = sum(t.numel() * t.element_size() for t in (*first[0], *first[1]))
    if case.passes != "forward":
        set_bytes += sum(t.numel() * t.element_size() for t in first[0])
    sets = buffer_sets(case, set_bytes, device, most_sets)
    data = [first, *(make_set(case, device, seed) for seed in range(1, sets))]
    op = getattr(kernels, case.op)
    dtype = DTYPES[case.dtype]
    auto = dispatch.resolve(case.op, "auto", device, dtype)

    def with_backend(name: str) -> Callable[[], Candidate]:
        def build() -> Candidate:
            dispatch.resolve(case.op, name, device, dtype)  # raises with the reason
            taken = name == ("auto" if case.op in _BY_SHAPE else auto)
            return _candidate(lambda *leaves: op(*leaves, backend=name), case, data, auto=taken)

        return build

    build: dict[str, Callable[[], Candidate]] = {}
    build["eager"] = lambda: _candidate(PLAIN[case.op], case, data)
    build["compile"] = lambda: _candidate(
        fresh_compile(PLAIN[case.op], keeps_graph=case.passes == "backward"), case, data
    )
    for name, make in peers(case, device, first[0]).items():
        build[name] = lambda make=make: _candidate(make(), case, data)  # type: ignore[misc]
    build["reference"] = with_backend("reference")
    if case.op in _BY_SHAPE:
        build["ours-auto"] = with_backend("auto")
    for name in dict.fromkeys((*dispatch.BACKENDS[case.op], "triton", "cuda")):
        # On a CPU the GPU's backends are no news; on a GPU a missing one is. Other people's kernels are peers.
        if name in ("cpu", "onednn", "triton", "cuda") and (name in ("cpu", "onednn")) == (device == "cpu"):
            build[f"ours-{name}"] = with_backend(name)

    def exact() -> Results:
        wide = [(_inputs(case, [t.double() for t in data[0][0]]), [t.double() for t in data[0][1]])]
        return _results(PLAIN[case.op], case, wide)  # shares nothing with what is judged

    return Subject(case, sets, set_bytes, build, exact, copies=case.op not in ("attention", "linear"))


def _inputs(case: Case, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same memory as inputs that ask for gradients, but for those that are constants."""
    count = len(LEAVES[case.op])
    return [t.detach().requires_grad_() for t in tensors[:count]] + list(tensors[count:])


def _candidate(function: Function, case: Case, data: list[Set], *, auto: bool = False) -> Candidate:
    sets = [(_inputs(case, inputs), cotangents) for inputs, cotangents in data]
    count = len(LEAVES[case.op])

    def forward(place: int) -> Any:
        with torch.no_grad():
            return function(*sets[place][0])

    def forward_backward(place: int) -> Any:
        inputs, cotangents = sets[place]
        outputs = function(*inputs)
        return outputs, torch.autograd.grad(outputs, inputs[:count], cotangents)

    graphs: dict[Any, list[Any]] = {}

    def backward(place: int) -> Any:
        # Backward runs on the stream that forward ran on: one that is captured needs a forward pass of its own.
        stream = torch.cuda.current_stream() if sets[0][0][0].is_cuda else None
        if stream not in graphs:
            graphs.clear()
            graphs[stream] = [function(*inputs) for inputs, _ in sets]
        inputs, cotangents = sets[place]
        return torch.autograd.grad(graphs[stream][place], inputs[:count], cotangents, retain_graph=True)

    call = {"forward": forward, "backward": backward, "forward_backward": forward_backward}[case.passes]
    return Candidate(call, lambda: _results(function, case, sets), auto=auto)


def _results(function: Function, case: Case, sets: list[Set]) -> Results:
    inputs, cotangents = sets[0]
    if case.passes == "forward":
        with torch.no_grad():
            outputs = function(*inputs)
    else:
        outputs = function(*inputs)
    many = outputs if isinstance(outputs, tuple) else (outputs,)
    found = {f"output {i}": t.detach() for i, t in enumerate(many)}
    if case.passes != "forward":
        names = LEAVES[case.op]
        grads = torch.autograd.grad(many, inputs[: len(names)], cotangents)
        found |= {f"d{name}": g for name, g in zip(names, grads, strict=True)}
    return found


def host_calls(op: str, device: str) -> dict[str, Callable[[], Any]]:
    """Calls of one token of width 8, forward without gradients: nothing is left but the host's time.

    ``layer_norm`` is PyTorch's bare operator, which does less: the price of one dispatch.
    """
    case = Case("adaln", op, "forward", "float32", (("B", 1), ("T", 1), ("D", 8), ("F", 8)))
    leaves, _ = make_set(case, device, 0)
    x, width = torch.randn(1, 1, 8, device=device), (8,)
    calls: dict[str, Callable[[], Any]] = {
        "layer_norm": lambda: F.layer_norm(x, width, eps=1e-6),
        "eager": lambda: PLAIN[op](*leaves),
        "ours": lambda: getattr(kernels, op)(*leaves),
    }
    return calls
