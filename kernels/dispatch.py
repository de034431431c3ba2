"""Which backend serves a call: what exists here, what proved itself, and the reason where one cannot run."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import _FAMILY, selfcheck
from ditscale.kernels.library import missing_reason

Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
KERNEL_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)

# Per operator: the backends that have an implementation, in the order in which `auto` tries them on a device.
BACKENDS: Final[dict[str, tuple[str, ...]]] = {
    "layernorm_modulate": ("cpu", "cuda", "triton"),
    "gate_residual": ("cpu", "cuda", "triton"),
    "gate_residual_layernorm_modulate": ("cpu", "cuda", "triton"),
    "bias_gelu": ("cpu", "cuda", "triton"),
    "qk_norm_rope": ("cpu", "cuda", "triton"),
    "attention": ("cpu", "cuda", "triton", "sdpa", "flash_attn", "xformers"),
    "linear": ("cpu", "onednn"),
}
LIBRARIES: Final = ("sdpa", "flash_attn", "xformers", "onednn")  # of others: nothing of ours to prove
_KNOWN: Final = ("cpu", "triton", "cuda", *LIBRARIES)
_NAMESPACES: Final = {"cpu": "ditscale", "cuda": "ditscale", "triton": "ditscale_triton", "onednn": "ditscale_onednn"}


def interpreting() -> bool:
    """True where Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def unavailable_reason(op: str, backend: str, device_type: str) -> str | None:
    """Why ``backend`` cannot serve ``op`` on a device of this type; None where it can."""
    if backend == "reference":
        return None
    if backend not in BACKENDS[op]:
        return f"{op} has no {backend} implementation"
    if backend == "onednn":
        from ditscale.kernels.matmul import onednn

        return onednn.missing(device_type)
    if backend in LIBRARIES:
        from ditscale.kernels.attn import adapters

        return adapters.missing(backend, device_type)
    if backend == "cpu":
        return missing_reason("cpu") or (None if device_type == "cpu" else f"it serves CPU tensors, not {device_type}")
    if backend == "cuda":
        return missing_reason("cuda") or (
            None if device_type == "cuda" else f"it serves CUDA tensors, not {device_type}"
        )
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "meta":
        return "tensors on the meta device have no data"
    if device_type == "cpu" and not interpreting():
        return "Triton runs on GPUs (on CPU tensors only in its interpreter, TRITON_INTERPRET=1)"
    try:
        importlib.import_module(f"ditscale.kernels.{_FAMILY[op]}.triton_kernels")  # defines ditscale_triton::*
    except ImportError as error:
        return f"triton does not import: {' '.join(str(error).split())}"
    return None


_Key = tuple[str, str, str, torch.dtype]  # operator, backend asked for, device type, dtype
_chosen: dict[_Key, str] = {}
_quick: dict[_Key, Any] = {}  # of those, the ones that have operators to call at once


def resolve(op: str, backend: str, device_type: str, dtype: torch.dtype, index: int | None = None) -> str:
    """The backend that serves this kind of call; raises where one was named that cannot.

    ``index``: of the GPU that asks, where a self-check runs; default: the current one.

    Raises:
        InputError: no such backend.
        BackendUnavailable: the named backend cannot run here; says why.
    """
    if not isinstance(backend, str):
        raise InputError(f"backend: expected a name, got {backend!r}")
    key = (op, backend, device_type, dtype)
    chosen = _chosen.get(key)
    if chosen is None:
        if device_type == "cuda" and backend == "auto" and _capturing():
            return "reference"  # a self-check cannot run inside a graph capture; warm up before it, as for any kernel
        chosen = _chosen[key] = _auto(op, device_type, dtype, index) if backend == "auto" else _named(*key)
        # Not Triton's: a launch trusts its arguments, so what the full path checks and converts must have been.
        if chosen in _NAMESPACES and chosen != "triton":
            _quick[key] = operators(chosen)
    return chosen


def _capturing() -> bool:
    """Whether a CUDA graph is being captured. Asking starts CUDA, which fake tensors of a machine without a GPU do not have."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _auto(op: str, device_type: str, dtype: torch.dtype, index: int | None) -> str:
    if dtype in KERNEL_DTYPES:
        for candidate in _order(op, device_type, dtype):
            if unavailable_reason(op, candidate, device_type) is not None:
                continue
            if candidate in LIBRARIES:
                return candidate
            # Interpreted Triton is for tests: it is only ever asked for by name.
            if not (candidate == "triton" and device_type == "cpu") and not selfcheck.failure(
                op, candidate, dtype, device_type, index
            ):
                return candidate
    return "sdpa" if "sdpa" in BACKENDS[op] else "reference"


def _order(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, ...]:
    if op == "linear":
        from ditscale.kernels.matmul.choice import fastest

        products = fastest(device_type) if dtype == torch.float32 else None
        return () if products is None else (products,)
    if op != "attention":
        return BACKENDS[op]
    from ditscale.kernels.attn import choice

    return choice.order(device_type)


def dtypes_of(op: str, backend: str) -> tuple[torch.dtype, ...] | None:
    """What a backend takes; None where that is another library's matter."""
    if backend == "reference":
        return None
    if op == "linear":
        return (torch.float32,)
    return None if backend in LIBRARIES else KERNEL_DTYPES


def _named(op: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    if backend not in ("reference", *_KNOWN):
        known = ", ".join(("auto", "reference", *BACKENDS[op]))
        raise InputError(f"backend: expected one of {known}, got {backend!r}")
    reason = unavailable_reason(op, backend, device_type)
    dtypes = dtypes_of(op, backend)
    if reason is None and dtypes is not None and dtype not in dtypes:
        came, *names = (str(t).removeprefix("torch.") for t in (dtype, *dtypes))
        taken = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        reason = f"it takes {taken}, not {came}"
    if reason is not None:
        raise BackendUnavailable(f"backend {backend!r} cannot run {op} here: {reason}")
    return backend


# torch.compile then runs it while tracing and keeps the answer (what torch.compiler.assume_constant_result does; that
# function imports the compiler, which takes a second that eager users should not pay).
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def quick(op: str, backend: str, x: Tensor) -> Any:
    """The operators for an eager call on ``x``; None where something else serves it, or more is to be found out.

    The first call of a kind, too, where a kernel serves it: checkpointing makes it again, and must find that the same was kept.
    None too inside torch.compile and transforms. What an operator does with the answer may so leave out every step that
    only those need: a small call lasts three microseconds in all. And None under a dispatch mode, for one that counts calls, as
    selective checkpointing does, must not meet one that is tried and refused.
    """
    if _is_compiling() or _transforms_active() or forward_ad._current_level >= 0 or _modes_active():
        return None
    key = (op, backend, "cpu" if x.is_cpu else x.device.type, x.dtype)
    found = _quick.get(key)
    if found is None and key not in _chosen and x.dtype in KERNEL_DTYPES:
        resolve(*key, x.device.index)
        found = _quick.get(key)
    return found


def choose(op: str, backend: str, x: Tensor) -> str:
    """The backend for a call on ``x``: plain PyTorch inside transforms, else what ``resolve`` says."""
    if in_transform():
        if backend != "auto":  # (no self-check in here: it would be transformed itself)
            resolve(op, backend, x.device.type, x.dtype, x.device.index)  # a wrong name is still said
        return "reference"
    return resolve(op, backend, x.device.type, x.dtype, x.device.index)


_is_compiling = torch.compiler.is_compiling  # found once: looking it up takes a third of calling it
_transforms_active = torch._C._are_functorch_transforms_active
_modes_active = torch._C._len_torch_dispatch_stack


def in_transform() -> bool:
    """True inside torch.func transforms and forward-mode AD, where only plain PyTorch gives right answers."""
    return _transforms_active() or forward_ad._current_level >= 0


class _Eager:
    """The operators of a namespace as what their overloads call: a Python frame less in every call."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:  # the first time only
        overload = getattr(self._namespace, name).default
        call = getattr(overload, "_op", overload)
        setattr(self, name, call)
        return call


_eager: dict[str, Any] = {}


def operators(backend: Any) -> Any:
    """The operators of a backend by its name, or what ``quick`` found; a family's are the same in every namespace."""
    if not isinstance(backend, str):
        return backend
    namespace = getattr(torch.ops, _NAMESPACES[backend])
    if torch.compiler.is_compiling():
        return namespace
    found = _eager.get(backend)
    if found is None:
        found = _eager[backend] = _Eager(namespace)
    return found


def check_float(name: str, t: Tensor) -> None:
    """Raise InputError unless ``t`` is a dense floating-point tensor."""
    if not isinstance(t, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(t).__name__}")
    if not t.is_floating_point():
        raise InputError(f"{name}: expected a floating-point tensor, got {str(t.dtype).removeprefix('torch.')}")
    if t.layout is not torch.strided:
        raise InputError(f"{name}: expected a dense tensor, got layout {str(t.layout).removeprefix('torch.')}")


def check_precision(name: str, t: Tensor) -> None:
    """Raise InputError unless ``t`` is a dense tensor of a dtype that kernels take, or float64, which the reference does."""
    check_float(name, t)
    if t.dtype not in (*KERNEL_DTYPES, torch.float64):
        came = str(t.dtype).removeprefix("torch.")
        raise InputError(f"{name}: expected float32, bfloat16, float16 or float64, got {came}")


def check_vector(name: str, t: Tensor | None, size: int, device: torch.device) -> None:
    """Raise InputError unless ``t`` is None or a floating-point [size] on a device."""
    if t is None:
        return
    check_float(name, t)
    if t.shape != (size,) or t.device != device:
        raise InputError(f"{name}: expected a floating-point [{size}] on {device}, got {list(t.shape)} on {t.device}")


def check_number(name: str, value: Any, *, least: float = -math.inf) -> None:
    """Raise InputError unless ``value`` is a finite number of at least ``least``. (A compiler has its own numbers.)"""
    if torch.compiler.is_compiling():
        return
    try:
        number = math.nan if isinstance(value, (str, bytes, bool)) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        bound = "" if least == -math.inf else f" of at least {least:g}"
        came = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) and value.dim() else repr(value)
        raise InputError(f"{name}: expected a finite number{bound}, got {came}")
