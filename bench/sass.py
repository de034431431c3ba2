"""What a compiled GPU kernel is made of: registers, local and shared memory, and its instructions. By NVIDIA's own ``cuobjdump``,
which comes with Triton; no GPU, no torch."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ditscale.errors import BackendUnavailable

# Beside the accesses to memory: what is worth telling of a kernel. ATOM and RED stand for every opcode that begins so.
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
# What gives the same in any order: bits that are set (of the allocator of tensor memory), integers over a warp.
_UNORDERED = re.compile(r"^REDUX|\.(AND|OR|XOR)\b")
_FEW = 8
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
        shared: bytes of static shared memory a block; on sm_90 and newer with the 1,024 that the system takes for itself of a
            block that uses any.
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
        return [kernel for _, kernel in read(Path(file.name))]


def read(path: Path, *, functions: Collection[str] | None = None) -> Iterator[tuple[str, Kernel]]:
    """(architecture such as "90", kernel) of every kernel of a cubin or of a library that holds several.

    Args:
        path: the file.
        functions: those whose instructions must be counted; others may be. Default: all.
    """
    usage = {}
    for arch, text in _sections(_run(["-res-usage"], path)):
        for name, *numbers in _USAGE.findall(text):
            usage[arch, name] = [int(n) for n in numbers]
    code: dict[tuple[str, str], str] = {}
    if functions is None or functions:
        # By name each takes as long as twenty without.
        chosen = ["-fun", ",".join(functions)] if functions and len(functions) < _FEW else []
        for arch, text in _sections(_run(["-sass", *chosen], path)):
            for body in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
                name, _, rest = body.partition("\n")
                code[arch, name.strip()] = rest
    for (arch, name), (registers, stack, shared, local) in usage.items():
        kernel = Kernel(name, registers, stack + local, shared)
        yield arch, _count(kernel, code[arch, name]) if (arch, name) in code else kernel


class Identity(NamedTuple):
    """What tells a kernel of a library from others without reading its instructions.

    Attributes:
        digest: of the machine code: equal ones are equal kernels.
        threads: most threads of a block, from ``__launch_bounds__``; 0 where there are none.
    """

    digest: str
    threads: int


def identities(library: Path) -> dict[tuple[str, str], Identity]:
    """(architecture, kernel) -> its identity, for every kernel of a library."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool(), "-xelf", "all", str(library.resolve())], cwd=folder, capture_output=True, check=True)
        for cubin in Path(folder).glob("*.cubin"):
            arch = _number(cubin.name.split(".")[-2])
            sections = dict(_sections_of_elf(cubin.read_bytes()))
            for name, text in sections.items():
                if name.startswith(".text."):
                    kernel = name.removeprefix(".text.")
                    threads = _most_threads(sections.get(f".nv.info.{kernel}", b""))
                    found[arch, kernel] = Identity(hashlib.sha256(text).hexdigest()[:16], threads)
    return found


_ASKED = struct.Struct("<32s28si")  # AskedShared of csrc/cuda/attention.cu


def asked_shared(library: Path) -> dict[tuple[str, str], int]:
    """(function, template arguments) -> bytes of shared memory that its launch asks for beside the kernel's own, as the sources
    of a library state it for the kernels that have such."""
    table = dict(_sections_of_elf(library.read_bytes())).get(".ditscale.shared", b"")
    rows = (_ASKED.unpack_from(table, at) for at in range(0, len(table), _ASKED.size))
    return {(kernel.rstrip(b"\0").decode(), case.rstrip(b"\0").decode()): size for kernel, case, size in rows}


_SIZED, _MAX_THREADS = 4, 5  # a format and an attribute of .nv.info: three numbers, the sizes of the largest block


def _most_threads(info: bytes) -> int:
    place = 0
    while place + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, place)
        if (form, attribute, size) == (_SIZED, _MAX_THREADS, 12):
            x, y, z = struct.unpack_from("<III", info, place + 4)
            return int(x * y * z)
        place += 4 + (size if form == _SIZED else 0)
    return 0


def _sections_of_elf(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of every section of a 64-bit ELF file."""
    (start,) = struct.unpack_from("<Q", data, 0x28)
    size, number, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, start + size * i) for i in range(number)]
    table = data[headers[names][4] :]
    for header in headers:
        name = table[header[0] : table.index(b"\0", header[0])].decode()
        yield name, data[header[4] : header[4] + header[5]]


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """The output, cut where a new embedded file begins; a cubin alone has no such line, and its architecture is ""."""
    parts = re.split(r"^arch = (\S+)$", text, flags=re.M)
    if len(parts) == 1:
        yield "", text
    yield from zip(map(_number, parts[1::2]), parts[2::2], strict=True)


def _number(arch: str) -> str:
    """ "90" of sm_90 and sm_90a: tools of different ages call the same code by either."""
    return re.sub(r"\D", "", arch)


def _run(flags: Sequence[str], path: Path) -> str:
    done = subprocess.run([tool(), *flags, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"cuobjdump {flags[0]}: {done.stderr.strip()[-300:]}")
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
        if head.startswith(("ATOM", "RED")):
            head = "" if _UNORDERED.search(opcode) else "ATOM" if head.startswith("ATOM") else "RED"
        if head in _CLASSES:
            mix[head] += 1
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
