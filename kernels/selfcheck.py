"""A kernel proves itself where it runs: on a small input, forward and backward, against plain PyTorch in float64.

``auto`` asks before it uses an (operator, backend, dtype) for the first time on a device. The verdict is kept in the user's
cache under the versions, device and driver it was found with, so it costs milliseconds once per machine. A kernel that no
one has run on a device yet cannot give a user a wrong number: a mismatch is said once and plain PyTorch takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

import ditscale
from ditscale.kernels.library import path_of

# Largest error allowed, relative to the largest value of the exact result: some ten roundings of the dtype.
TOLERANCE: Final = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_SHAPES: Final = (
    (2, 37, 72),
    (3, 5, 13),
)  # vectors of every width fit in 72, none in 13; two chunks of tokens and one

Tensors = tuple[Tensor, ...]


def _numbers(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    """Float64 in about [-1.6, 1.6], without touching the random state of the user."""
    count = 1
    for n in shape:
        count *= n
    i = torch.arange(count, dtype=torch.float64, device=device)
    return (1.6 * torch.sin(i * 12.9898 + seed * 78.233)).reshape(shape)


def _inputs(op: str, shape: tuple[int, int, int], device: str) -> Tensors:
    B, T, D = shape
    rows = [_numbers((B, T, D), k, device) for k in (1, 2)]
    mods = _numbers((B, 3 * D), 3, device).chunk(3, dim=1)  # strided, as a model's are
    if op == "layernorm_modulate":
        return (rows[0], mods[0], mods[1])
    if op == "gate_residual":
        return (rows[0], rows[1], mods[2])
    if op == "gate_residual_layernorm_modulate":
        return (rows[0], rows[1], mods[2], mods[0], mods[1])
    if op == "bias_gelu":
        return (rows[0], mods[0][0])
    if op == "qk_norm_rope":
        q, k = _numbers((B, T, 2, D), 1, device).unsqueeze(1).unbind(3)
        return (q, k, mods[0][0], mods[1][0])
    if op == "attention":
        return tuple(_numbers((B, T, 3, D), 1, device).unsqueeze(1).unbind(3))  # one head; parts of one projection
    raise ValueError(f"no self-check for {op}")


def _run(function: Callable[..., Tensor | Tensors], inputs: Tensors, backend: str, stored: torch.dtype) -> Tensors:
    """Outputs and gradients. Both runs of a comparison get the same numbers: those that the dtype ``stored`` can hold."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    weights = [_numbers(tuple(o.shape), 7 + k, str(o.device)).to(stored).to(o.dtype) for k, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, weights)
    return (*(o.detach() for o in outputs), *grads)


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """No mode of the caller (fake tensors, FLOP counting, autocast, inference) sees the check or changes it."""
    from torch.utils._python_dispatch import _disable_current_modes

    with (
        _disable_current_modes(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield


def compare(op: str, backend: str, dtype: torch.dtype, device: str) -> str | None:
    """Run the check now; None where the kernel is right, else what is wrong in one line."""
    from ditscale import kernels

    function = getattr(kernels, op)
    with _plain():
        for shape in _SHAPES:
            inputs = tuple(t.to(dtype) for t in _inputs(op, shape, device))
            try:
                got = _run(function, inputs, backend, dtype)
            except Exception as error:  # whatever a device, driver or compiler throws is a reason not to use the kernel
                return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            exact = _run(function, tuple(t.double() for t in inputs), "reference", dtype)
            for k, (a, b) in enumerate(zip(got, exact, strict=True)):
                limit = TOLERANCE[dtype] * max(float(b.abs().max()), 1.0)
                worst = float((a.double() - b).abs().max())
                if not worst <= limit:
                    return f"result {k} at shape {list(shape)} is off by {worst:.2e}, allowed {limit:.2e}"
    return None


def _cache_file() -> Path:
    home = os.environ.get("DITSCALE_CACHE")
    if home:
        return Path(home) / "selfcheck.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditscale" / "selfcheck.json"


@functools.cache
def _where(backend: str, device_type: str) -> str:
    """What a verdict holds for: versions, the library's build, device and driver."""
    parts = [ditscale.__version__, torch.__version__]
    if backend in ("cpu", "cuda"):
        stat = path_of(backend).stat()
        parts += [str(stat.st_size), str(stat.st_mtime_ns)]
    if backend == "cpu":
        from ditscale.kernels.library import cpu_isa

        parts.append(str(cpu_isa()))
    if backend == "triton":
        import triton

        parts.append(triton.__version__)
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
        parts += [properties.name, f"sm_{properties.major}{properties.minor}", str(driver)]
    return " ".join(parts)


def _read() -> dict[str, str | None]:
    try:
        found = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, verdict: str | None) -> None:
    path = _cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(), key: verdict}, file, indent=0)
        os.replace(file.name, path)
    except OSError:
        return  # a cache that cannot be written costs the next process a check, nothing else


@functools.cache
def failure(op: str, backend: str, dtype: torch.dtype, device_type: str) -> str | None:
    """What the self-check found against the kernel, from the cache or by running it; None where it may be used."""
    key = f"{op} {backend} {str(dtype).removeprefix('torch.')} on {_where(backend, device_type)}"
    known = _read()
    if key in known:
        verdict = known[key]
    else:
        verdict = compare(op, backend, dtype, device_type)
        _write(key, verdict)
    if verdict is not None:
        warnings.warn(
            f"ditscale: the {backend} kernel of {op} failed its self-check on {device_type} in "
            f"{str(dtype).removeprefix('torch.')} and is not used: {verdict}",
            RuntimeWarning,
            stacklevel=2,
        )
    return verdict
