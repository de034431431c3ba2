"""What a compiled GPU kernel is made of: registers, local and shared memory, and its instructions. By NVIDIA's own ``cuobjdump``,
which comes with Triton; no GPU, no torch."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ditscale.errors import BackendUnavailable

# Beside the accesses to memory: what is worth telling of a kernel. A name stands for every opcode that begins with it.
_CLASSES = {
    "HMMA": "tensor cores, mma.sync",
    "HGMMA": "tensor cores of Hopper, wgmma",
    "UTCHMMA": "tensor cores of Blackwell, tcgen05",
    "LDSM": "shared to registers, matrices",
    "LDS": "shared loads",
    "STS": "shared stores",
    "SHFL": "shuffles",
    "BAR": "barriers",
    "MUFU": "special functions",
    "FFMA": "float32 multiply-adds",
    "DADD": "float64 additions",
    "DFMA": "float64 multiply-adds",
    "ATOM": "atomics",
    "RED": "atomics without a result",
}
_BITS = re.compile(r"\.(256|128|64)\b|\.[US](16|8)\b")
_OPCODE = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """One function of one architecture.

    Attributes:
        name: as the object file has it.
        registers: a thread.
        stack: bytes of local memory a thread: spilled registers and arrays.
        shared: bytes of static shared memory a block.
        loads, stores: accesses to global memory in the code, by bits a thread; asynchronous copies to shared memory are loads.
        local: instructions that read or write local memory.
        bulk: copies by the bulk or tensor copy engine.
        mix: how many instructions of the classes that matter; "all" is every one.
    """

    name: str
    registers: int
    stack: int
    shared: int
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    local: int = 0
    bulk: int = 0
    mix: dict[str, int] = field(default_factory=dict)


def tool() -> str:
    """Path of ``cuobjdump``: Triton's, or one on the PATH.

    Raises:
        BackendUnavailable: there is none.
    """
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or [] if spec else []:
        found = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if found.is_file():
            return str(found)
    on_path = shutil.which("cuobjdump")
    if on_path is None:
        raise BackendUnavailable("cuobjdump is not here: it comes with triton and with the CUDA toolkit")
    return on_path


def kernels_of(binary: bytes) -> list[Kernel]:
    """The kernels of a cubin, with their instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return [kernel for _, kernel in read(Path(file.name), instructions=True)]


def read(path: Path, *, instructions: bool) -> Iterator[tuple[str, Kernel]]:
    """(architecture, kernel) of every kernel of a cubin or of a library that holds several.

    Args:
        path: the file.
        instructions: also count instructions, which takes seconds for a library.
    """
    usage = {}
    for arch, text in _sections(_run("-res-usage", path)):
        for name, *numbers in _USAGE.findall(text):
            usage[arch, name] = [int(n) for n in numbers]
    code: dict[tuple[str, str], str] = {}
    if instructions:
        for arch, text in _sections(_run("-sass", path)):
            for body in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
                name, _, rest = body.partition("\n")
                code[arch, name.strip()] = rest
    for (arch, name), (registers, stack, shared, local) in usage.items():
        kernel = Kernel(name, registers, stack + local, shared)
        if instructions:
            kernel = _count(kernel, code[arch, name])
        yield arch, kernel


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """The output, cut where a new embedded file begins; a cubin alone has no such line, and its architecture is ""."""
    parts = re.split(r"^arch = (\S+)$", text, flags=re.M)
    if len(parts) == 1:
        yield "", text
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _run(flag: str, path: Path) -> str:
    done = subprocess.run([tool(), flag, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flag}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _count(kernel: Kernel, code: str) -> Kernel:
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    mix: Counter[str] = Counter()
    local = bulk = 0
    for opcode in _OPCODE.findall(code):
        head = opcode.split(".", 1)[0]
        if head in ("LDG", "LDGSTS", "LD"):
            loads[_width(opcode)] += 1
        elif head in ("STG", "ST"):
            stores[_width(opcode)] += 1
        elif head in ("LDL", "STL"):
            local += 1
        elif head.startswith(("UTMA", "UBLKCP")):
            bulk += 1
        mix["all"] += head != "NOP"
        mix.update(name for name in _CLASSES if head == name or (name in ("ATOM", "RED") and head.startswith(name)))
    return Kernel(
        kernel.name,
        kernel.registers,
        kernel.stack,
        kernel.shared,
        dict(sorted(loads.items())),
        dict(sorted(stores.items())),
        local,
        bulk,
        dict(sorted(mix.items())),
    )


def _width(opcode: str) -> int:
    found = _BITS.search(opcode)
    return int(found[1] or found[2]) if found else 32
