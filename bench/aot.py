"""The entries of the ahead-of-time table, and those of Triton: every kernel compiled for every architecture, without a GPU.
``aot_cuda.py`` has those of the CUDA library; ``budget.py`` compares them with what is committed.

Launches come from the kernels' own ``aot`` modules. They are carried out up to the compiler, with Triton's driver replaced by
one that stands for the architecture asked for: signature, tiles, warps and stages are those that the launcher chooses.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import itertools
import json
import math
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from ditscale.bench import sass
from ditscale.errors import InputError
from ditscale.kernels.aot import ARCHITECTURES, Launch

# Limits of a multiprocessor, CUDA C++ programming guide, "Technical specifications per compute capability": warps, blocks, bytes
# of shared memory. All have 65,536 registers.
LIMITS = {
    "80": (64, 32, 164 << 10),
    "86": (48, 16, 100 << 10),
    "89": (48, 24, 100 << 10),
    "90": (64, 32, 228 << 10),
    "100": (64, 32, 228 << 10),
    "120": (48, 24, 100 << 10),
}
# The device whose published peaks stand for an architecture where a time at the roof is predicted.
DEVICES = {"80": "a100", "86": "rtx 3090", "89": "rtx 4090", "90": "h100", "100": "b200", "120": "rtx 5090"}
_REGISTERS = 65_536
_BLOCK_RESERVE = 1024  # bytes of shared memory that the system takes of every block
_COUNTS_RESERVE = 90  # from this architecture on, what a compiled kernel says of its shared memory has them in it


@dataclass(frozen=True)
class Entry:
    """One kernel of one architecture, as the table and the budget have it.

    Attributes:
        family: of the kernels ("adaln"), or the source file of a CUDA kernel ("cuda-norm").
        case: the launch that it belongs to, or the template arguments of a CUDA kernel.
        kernel: the function.
        arch: "80" to "120".
        fingerprint: of everything that the compiler is given, and which compiler; equal fingerprints make equal kernels.
        threads: of a block, of a CUDA kernel the most; 0 where the binary does not tell.
        grid: blocks of the launch; 0 where unknown.
        resources: registers, stack, shared bytes (static and asked for at the launch, without what the system takes of a
            block), accesses, mix (see :class:`sass.Kernel`); None while it is not compiled.
        stack_bytes: local memory that the launch is allowed.
    """

    family: str
    case: str
    kernel: str
    arch: str
    fingerprint: str
    threads: int = 0
    grid: int = 0
    resources: dict[str, Any] | None = None
    stack_bytes: int = field(default=0, compare=False)

    @property
    def compiler(self) -> str:
        """Such as "triton 3.7.1"."""
        return self.fingerprint.partition(" ")[2]

    @property
    def key(self) -> str:
        """What an entry is found by in the budget."""
        return f"{self.case} {self.kernel} sm_{self.arch}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, as a line of the budget holds them."""
        content = asdict(self)
        del content["stack_bytes"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Entry:
        """The inverse; widths of accesses become numbers again."""
        resources = content["resources"]
        for name in ("loads", "stores"):
            resources[name] = {int(bits): n for bits, n in resources[name].items()}
        return cls(**{**content, "resources": resources})

    def accessed(self, name: str) -> int:
        """Bytes a thread in the code's accesses ("loads" or "stores"): what grows when traffic is widened."""
        assert self.resources is not None
        return sum(bits // 8 * n for bits, n in self.resources[name].items())

    @property
    def wide_share(self) -> float:
        """The share of those bytes that moves in accesses of 16 bytes or more, or by the copy engines."""
        assert self.resources is not None
        both = [(bits, n) for name in ("loads", "stores") for bits, n in self.resources[name].items()]
        total = sum(bits * n for bits, n in both)
        return sum(bits * n for bits, n in both if bits >= 128) / total if total else 1.0

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that a multiprocessor holds at once; 0 where the size of a block is not known."""
        assert self.resources is not None
        if not self.threads:
            return 0
        warps, blocks, shared = LIMITS[self.arch]
        of_block = -(-self.threads // 32)
        # Registers are given out to a warp in 256s.
        registers = -(-self.resources["registers"] * 32 // 256) * 256 * of_block
        limits = [blocks, warps // of_block, _REGISTERS // max(1, registers)]
        return min([*limits, shared // (self.resources["shared"] + _BLOCK_RESERVE)])


def families() -> list[str]:
    """The families of kernels that have launches to compile."""
    from ditscale import kernels

    names = [m.name for m in pkgutil.iter_modules(kernels.__path__) if m.ispkg]
    return [name for name in names if importlib.util.find_spec(f"ditscale.kernels.{name}.aot")]


def launches(family: str) -> list[Launch]:
    """What a family's ``aot`` module lists.

    Raises:
        InputError: no such family, or two of its launches share a name.
    """
    if family not in families():
        raise InputError(f"family: expected one of {', '.join(families())}, got {family!r}")
    found: list[Launch] = importlib.import_module(f"ditscale.kernels.{family}.aot").launches()
    names = [launch.id for launch in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"ditscale.kernels.{family}.aot: expected launches with names of their own, got {twice[0]!r} twice"
        )
    return found


_devices = itertools.count()


class _Driver:
    """Stands for a GPU of an architecture where Triton asks for one before it compiles."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)
        # Triton keeps what it has compiled by device: a device of its own for every driver.
        self._device = ("ahead of time", next(_devices))
        shared = LIMITS[str(arch)][2] - _BLOCK_RESERVE
        facts = {"multiprocessor_count": 132, "max_shared_mem": shared, "warpSize": 32}
        self.utils = SimpleNamespace(get_device_properties=lambda device: facts)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> Any:
        return self._device

    def get_current_stream(self, device: Any) -> int:
        return 0


@dataclass(frozen=True)
class _Capture:
    """What the compiler was asked for, and ``make`` to have it done."""

    name: str
    fingerprint: str
    threads: int
    grid: int
    make: Callable[[], Any]


@contextlib.contextmanager
def _capturing(arch: int) -> Iterator[list[_Capture]]:
    """Within it, launching a Triton kernel compiles and runs nothing and is written down."""
    import triton
    import triton.compiler
    from triton.runtime import driver, jit

    from ditscale.kernels.dispatch import interpreting

    if interpreting():
        raise InputError("TRITON_INTERPRET: expected 0 for compiling ahead of time, got 1")
    found: list[_Capture] = []
    grids: list[int] = []
    kept = driver._active, triton.compiler.compile, jit.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        names = [p.name for p in self.params]
        sizes = grid(dict(zip(names, args, strict=False)) | kwargs) if callable(grid) else grid
        grids.append(math.prod(map(int, sizes)))
        return kept[2](self, *args, grid=grid, warmup=True, **kwargs)

    def compile_(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        threads = 32 * int((options or {}).get("num_warps", 4))
        print_ = _fingerprint(src, options or {}, arch, triton.__version__)
        make = lambda: kept[1](src, target=target, options=options, **more)  # noqa: E731
        found.append(_Capture(src.fn.__name__, print_, threads, grids[-1], make))
        return object()

    driver.set_active(_Driver(arch))
    triton.compiler.compile, jit.JITFunction.run = compile_, run
    try:
        yield found
    finally:
        driver._active, triton.compiler.compile, jit.JITFunction.run = kept


def _fingerprint(src: Any, options: dict[str, Any], arch: int, version: str) -> str:
    """Of sources, signature, constants and options; free of places on this machine and of line numbers."""
    chosen = {k: v for k, v in options.items() if k != "extern_libs"}
    parts = [
        arch,
        version,
        _sources(src.fn),
        src.signature,
        sorted(map(str, src.constants.items())),
        sorted(map(str, src.attrs.items())),
        chosen,
    ]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"{digest} triton {version}"


def _sources(fn: Any) -> list[str]:
    """The text of a kernel and of what it calls, with the constants that they name."""
    from triton.runtime.jit import JITFunction

    texts: dict[str, str] = {}
    queue = [fn]
    while queue:
        at = queue.pop()
        texts[at.__name__] = at.src
        for name in at.fn.__code__.co_names:
            value = at.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                if value.__name__ not in texts:
                    queue.append(value)
            elif isinstance(value, (bool, int, float, str)) or type(value).__name__ == "constexpr":
                texts[name] = repr(value)
    return [f"{name}\n{text}" for name, text in sorted(texts.items())]


def triton_entries(
    family: str,
    *,
    archs: Iterable[int] = ARCHITECTURES,
    wanted: Callable[[Launch, int], bool] = lambda launch, arch: True,
    known: dict[str, Entry] | None = None,
    only_fingerprints: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Entry]:
    """The kernels of a family's launches.

    Args:
        family: its name.
        archs: compute capabilities.
        wanted: which launches to take for which of them.
        known: entries by fingerprint, whose resources are taken over instead of compiling again.
        only_fingerprints: compile nothing; resources are None where they are not known.
        say: takes a line for each kernel that is compiled.
    """
    known = dict(known or {})
    for arch in archs:
        for launch in launches(family):
            if arch not in launch.architectures or not wanted(launch, arch):
                continue
            with _capturing(arch) as captures:
                launch.call(launch.shape, launch.dtype)
            for capture in {c.fingerprint: c for c in captures}.values():
                entry = Entry(
                    family,
                    launch.id,
                    capture.name,
                    str(arch),
                    capture.fingerprint,
                    capture.threads,
                    capture.grid,
                    stack_bytes=launch.stack_bytes,
                )
                old = known.get(capture.fingerprint)
                resources = old.resources if old else None
                if resources is None and not only_fingerprints:
                    say(entry.key)
                    resources = _resources(capture, arch)
                entry = replace(entry, resources=resources)
                known[capture.fingerprint] = entry
                yield entry


def _resources(capture: _Capture, arch: int) -> dict[str, Any]:
    compiled = capture.make()
    (kernel,) = sass.kernels_of(compiled.asm["cubin"])
    # What a launch asks for the file does not tell; it is in Triton's own count.
    return resources_of(kernel) | {"shared": max(static_shared(kernel, arch), int(compiled.metadata.shared))}


def static_shared(kernel: sass.Kernel, arch: int) -> int:
    """Bytes of a kernel's own shared memory, without what the system takes of a block."""
    return max(0, kernel.shared - _BLOCK_RESERVE) if arch >= _COUNTS_RESERVE else kernel.shared


def resources_of(kernel: sass.Kernel) -> dict[str, Any]:
    """A kernel's resources as plain values."""
    content = asdict(kernel)
    del content["name"]
    return content
