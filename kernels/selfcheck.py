"""A kernel proves itself where it runs: on a small input, forward and backward, against plain PyTorch in float64.

``auto`` asks before it uses an (operator, backend, dtype) for the first time: on one device of each kind. The verdict is kept
in the user's cache under the versions, device and driver it was found with, so it costs milliseconds once per machine. A kernel
that no one has run on a device yet cannot give a user a wrong number: a mismatch is said once and plain PyTorch takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

import ditscale
from ditscale.cache import cache_folder
from ditscale.kernels.library import cpu_isa, path_of

# Largest error allowed, relative to the largest value of the exact result: some ten roundings of the dtype.
TOLERANCE: Final = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Shape = tuple[int, int, int]
# [B, T, D]: vectors of every width fit in 72, none in 13; two chunks of tokens and one.
_SHAPES: Final[tuple[Shape, ...]] = ((2, 37, 72), (3, 5, 13))
# Rows of several warps, and enough numbers for statistics to be kept for backward; rows that no thread holds in registers.
_WIDE: Final[tuple[Shape, ...]] = ((1, 17, 1152), (1, 2, 16384))
# Heads of which several tiles are on their way at once, the last one whole or not.
_LONG: Final[tuple[Shape, ...]] = ((1, 200, 72), (1, 256, 64))
# The other widths that have a kernel of their own. (Triton would compile three for each: at a first use, seconds.)
_OTHER_HEADS: Final[tuple[Shape, ...]] = ((1, 200, 80), (1, 200, 96), (1, 200, 128))
# Half a head of 64 is vectors of eight halves, of 72 such of four: kernels of their own.
_TURNED: Final[tuple[Shape, ...]] = ((1, 9, 64),)
# Rows by a large weight, four at a time and one by one.
_FEW: Final[tuple[Shape, ...]] = ((1, 7, 4096),)
_NORMS: Final = ("layernorm_modulate", "gate_residual_layernorm_modulate")
_MODULATED: Final = (*_NORMS, "gate_residual")

THREW: Final = "it threw "  # how such a reason begins; it may be of the moment (no memory left), so it is not kept

Tensors = tuple[Tensor, ...]


class _Case(NamedTuple):
    """What an operator is called with: [B, T, D], which rows share a modulation, what else is switched on."""

    shape: Shape
    mode: str = "per_sample"  # or "per_token", "shared"
    wide: bool = False  # modulation (the bias of a GELU) in float32, whatever the rows are
    affine_rms: bool = False


def _numbers(shape: tuple[int, ...], seed: int, device: str) -> Tensor:
    """Float64 in about [-1.6, 1.6], without touching the random state of the user."""
    i = torch.arange(math.prod(shape), dtype=torch.float64, device=device)
    return (1.6 * torch.sin(i * 12.9898 + seed * 78.233)).reshape(shape)


def _inputs(op: str, case: _Case, dtype: torch.dtype, device: str) -> Tensors:
    B, T, D = case.shape
    rows = [_numbers((B, T, D), k, device).to(dtype) for k in (1, 2)]
    lead = {"shared": (), "per_sample": (B,), "per_token": (B, T)}[case.mode]
    table = _numbers((*lead, 3 * D), 3, device).to(torch.float32 if case.wide else dtype)
    mods = table.chunk(3, dim=-1)  # strided, as a model's are
    if op == "layernorm_modulate":
        return (rows[0], mods[0], mods[1])
    if op == "gate_residual":
        return (rows[0], rows[1], mods[2])
    if op == "gate_residual_layernorm_modulate":
        return (rows[0], rows[1], mods[2], mods[0], mods[1])
    if op == "bias_gelu":
        return (rows[0], mods[0][0])
    if op == "linear":
        return (rows[0], _numbers((40, D), 3, device).to(dtype), _numbers((40,), 4, device).to(dtype))
    # Two heads; parts of one projection.
    q, k, v = _numbers((B, T, 3, 2, D), 1, device).to(dtype).permute(2, 0, 3, 1, 4)
    if op == "qk_norm_rope":
        return (q, k, mods[0][0], mods[1][0])
    if op == "attention":
        return (q, k, v)
    raise ValueError(f"no self-check for {op}")


def _calls(op: str, case: _Case, device: str) -> list[Callable[..., Tensor | Tensors]]:
    """The operator as it is called in a case: with rotations too, both kinds of pairs, where the width allows one."""
    from ditscale import kernels

    function = getattr(kernels, op)
    width = case.shape[2]
    if case.affine_rms:
        weight, bias = (_numbers((width,), k, device).float() for k in (5, 6))
        return [functools.partial(function, weight=weight, bias=bias, norm="rms")]
    if op != "qk_norm_rope" or width % 2:
        return [function]
    angles = _numbers((case.shape[1], width // 2), 5, device).float()
    tables = {"cos": angles.cos(), "sin": angles.sin()}
    return [
        functools.partial(function, **tables),
        functools.partial(function, **tables, norm="layer", interleaved=True),
        functools.partial(function, **tables, norm="none"),
    ]


def _run(function: Callable[..., Tensor | Tensors], inputs: Tensors, backend: str, stored: torch.dtype) -> Tensors:
    """Outputs and gradients. Both runs of a comparison get the same numbers: those that the dtype ``stored`` can hold."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    weights = [_numbers(tuple(o.shape), 7 + k, str(o.device)).to(stored).to(o.dtype) for k, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, leaves, weights)
    return (*(o.detach() for o in outputs), *grads)


def compare(op: str, backend: str, dtype: torch.dtype, device: str, index: int | None = None) -> str | None:
    """Run the check now; None where the kernel is right, else what is wrong in one line. ``index`` of a GPU: the current one."""
    try:
        return _apart(lambda: _compare(op, backend, dtype, device), device, index)
    except Exception as error:  # whatever a device, driver or compiler throws is a reason not to use the kernel
        began = "it broke the device's context: " if context_is_lost(device, index) else THREW
        return f"{began}{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def context_is_lost(device: str, index: int | None = None) -> bool:
    """Whether nothing runs on the device any more in this process, as after an access to what is not there: no matter of the
    moment, and the next process is better off not to try."""
    if device != "cuda":
        return False
    try:
        torch.cuda.synchronize(index)
    except RuntimeError:
        return True
    return False


def _apart(call: Callable[[], str | None], device: str, index: int | None = None) -> str | None:
    """The result of ``call`` in a thread of its own: whatever the caller is inside of (fake tensors, counting, autocast,
    inference, transforms, hooks on saved tensors) belongs to the caller's thread and neither sees the check nor changes it.
    """

    def run() -> str | None:
        if device == "cuda":
            torch.cuda.set_device(current if index is None else index)
        return call()

    current = torch.cuda.current_device() if device == "cuda" else 0
    with ThreadPoolExecutor(1, "ditscale-self-check") as thread:
        return thread.submit(run).result()


def _cases(op: str, backend: str) -> list[_Case]:
    """What takes an operator through the kernels of a backend: each kind of modulation and norm, rows of every width."""
    shapes = _SHAPES
    if op == "attention":
        shapes += _LONG if backend == "triton" else _LONG + _OTHER_HEADS
    else:
        shapes += _TURNED if op == "qk_norm_rope" else _WIDE
        shapes += _FEW if op == "linear" else ()
    cases = [_Case(shape) for shape in shapes]
    if op in _MODULATED:
        cases += [*(_Case(shape, "per_token") for shape in _SHAPES), _Case(_SHAPES[0], "shared")]
    if op in (*_MODULATED, "bias_gelu"):
        cases.append(_Case(_SHAPES[0], wide=True))
    if op in _NORMS:  # without statistics that are kept, and with them
        cases += [_Case(shape, affine_rms=True) for shape in (_SHAPES[0], _WIDE[0])]
    return cases


def _compare(op: str, backend: str, dtype: torch.dtype, device: str) -> str | None:
    for case, function in ((c, f) for c in _cases(op, backend) for f in _calls(op, c, device)):
        inputs = _inputs(op, case, dtype, device)
        got = _run(function, inputs, backend, dtype)
        exact = _run(function, tuple(t.double() for t in inputs), "reference", dtype)
        for k, (a, b) in enumerate(zip(got, exact, strict=True)):
            limit = TOLERANCE[dtype] * max(float(b.abs().max()), 1.0)
            worst = float((a.double() - b).abs().max())
            if not worst <= limit:
                return f"result {k} at shape {list(case.shape)} is off by {worst:.2e}, allowed {limit:.2e}"
    return None


def _cache_file() -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "selfcheck.json"


def _kinds(device_type: str, first: int | None = None) -> list[int]:
    """A device of each kind that this process sees: ``auto`` chooses for all of them alike.

    Of its own kind ``first``, or the current one: another may be full, and would keep a context of this process for good.
    """
    count = torch.cuda.device_count() if device_type == "cuda" else 1
    if first is None and device_type == "cuda" and count:
        first = torch.cuda.current_device()
    kinds: dict[tuple[str, ...], int] = {}
    for index in sorted(range(count), key=lambda index: index != first):
        kinds.setdefault(_kind(device_type, index), index)
    return list(kinds.values())


def _kind(device_type: str, index: int) -> tuple[str, ...]:
    if device_type != "cuda":
        return ()
    properties = torch.cuda.get_device_properties(index)
    return (properties.name, f"sm_{properties.major}{properties.minor}")


@functools.cache
def _where(backend: str, device_type: str, index: int) -> str:
    """What a verdict holds for: versions, the build of the kernel, device and driver."""
    parts = [ditscale.__version__, torch.__version__]
    for source in _sources(backend):
        stat = source.stat()
        parts += [str(stat.st_size), str(stat.st_mtime_ns)]
    if backend == "cpu":
        parts.append(str(cpu_isa()))
    if backend == "triton":
        import triton

        parts.append(triton.__version__)
    if device_type == "cuda":
        driver = torch._C._cuda_getDriverVersion() if hasattr(torch._C, "_cuda_getDriverVersion") else 0
        parts += [*_kind(device_type, index), str(driver)]
    return " ".join(parts)


def _sources(backend: str) -> list[Path]:
    """This check, and what the kernels are made of: families of Triton kernels use each other's."""
    here = Path(__file__)
    return [here, *([path_of(backend)] if backend in ("cpu", "cuda") else sorted(here.parent.glob("*/triton_*.py")))]


def _read() -> dict[str, str | None]:
    path = _cache_file()
    try:
        found = json.loads(path.read_text()) if path else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(key: str, verdict: str | None) -> None:
    """Keep a verdict. Of two processes that write at once one may lose its own, which costs a later one a check."""
    path = _cache_file()
    if path is None:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(), key: verdict}, indent=0))
        os.replace(temporary, path)
    except OSError:  # a cache that cannot be written costs the next process a check, nothing else
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check(
    op: str, backend: str, dtype: torch.dtype, device_type: str, *, first: int | None = None, again: bool = False
) -> str | None:
    """What is wrong with a kernel on any kind of device here; None: nothing. From the cache or, where that knows nothing or
    ``again``, by running it; on the GPU ``first`` before others (default: the current one)."""
    for index in _kinds(device_type, first):
        key = f"{op} {backend} {str(dtype).removeprefix('torch.')} on {_where(backend, device_type, index)}"
        known = {} if again else _read()
        if key in known:
            verdict = known[key]
        else:
            verdict = compare(op, backend, dtype, device_type, index)
            if verdict is None or not verdict.startswith(THREW):
                _write(key, verdict)
        if verdict is not None:
            return verdict
    return None


@functools.cache
def failure(op: str, backend: str, dtype: torch.dtype, device_type: str, first: int | None = None) -> str | None:
    """What the self-check has against a kernel, said once a process; None where it may be used."""
    verdict = check(op, backend, dtype, device_type, first=first)
    if verdict is not None:
        warnings.warn(
            f"ditscale: the {backend} kernel of {op} failed its self-check on {device_type} in "
            f"{str(dtype).removeprefix('torch.')} and is not used: {verdict}",
            RuntimeWarning,
            stacklevel=2,
        )
    return verdict
