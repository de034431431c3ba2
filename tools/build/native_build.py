"""Compiles csrc/ into the two libraries of the package, against torch's stable ABI and without importing torch.

The compile needs torch's headers and the name of one of its libraries, nothing of its C++ symbols, so one result serves
every torch from TARGET on. Files are written under a temporary name and renamed, so that a process that has the old
library open goes on with it.

Environment: CXX, CXXFLAGS (host compiler), CUDA_HOME (where nvcc is), MAX_JOBS (compilers at once), DITSCALE_SKIP_CUDA=1 (no
CUDA library).
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TARGET = "0x020a000000000000"  # torch 2.10: the oldest whose C shim has parallel_for
HOST_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}"]
HOST_FLAGS += ["-Wall", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # as which GCC 12 sees its own AVX-512 header
LINK_FLAGS = ["-shared", "-Wl,-s"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2]
ON_X86 = platform.machine() in ("x86_64", "AMD64")
FAMILIES = ("adaln", "attention", "rotary", "product", "adamw")  # the slow ones first
X86_UNITS: dict[str, list[str]] = {
    f"cpu/{family}_{isa}.cpp": flags for family in FAMILIES for isa, flags in (("avx2", AVX2), ("avx512", AVX512))
}
# On x86 they serve processors of before 2013: a fifth slower there (measured) is not worth half a minute of everybody's build.
PORTABLE = ["-O1"] if ON_X86 else []
CPU_UNITS: dict[str, list[str]] = {
    **(X86_UNITS if ON_X86 else {}),
    **{f"cpu/{family}_portable.cpp": PORTABLE for family in FAMILIES},
    **{f"cpu/{family}.cpp": [] for family in FAMILIES},
    "bindings/schemas.cpp": [],
    "cpu/isa.cpp": [],
}
CUDA_ARCHITECTURES = ("80", "90a", "100", "120")
CUDA_KERNELS = (
    "cuda/attention_bf16.cu",
    "cuda/attention_f16.cu",
    "cuda/attention_f32.cu",
    "cuda/norm.cu",
    "cuda/rotary.cu",
    "cuda/rows.cu",
    "cuda/attention.cu",
)
CUDA_BINDINGS = ("cuda/bindings.cpp", "cuda/attention_bindings.cpp", "cuda/rotary_bindings.cpp")


def say(message: str) -> None:
    """One line for whoever waits for the build."""
    print(f"ditscale: {message}", file=sys.stderr, flush=True)


def find_torch() -> Path | None:
    """The folder of the torch to build against: importable, or in the environment that an isolated build is for."""
    spec = importlib.util.find_spec("torch")
    found = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in found:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def find_nvcc() -> Path | None:
    """nvcc: under CUDA_HOME, on the PATH, or at the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    for candidate in [*(Path(h) / "bin/nvcc" for h in homes), on_path, "/usr/local/cuda/bin/nvcc"]:
        if candidate is not None and Path(candidate).is_file():
            return Path(candidate)
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        sys.stderr.write(done.stderr)


def _run_all(commands: list[list[str]]) -> None:
    jobs = int(os.environ.get("MAX_JOBS", 0)) or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_run, commands))


def _link(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        _run([*command, "-o", str(temporary)])
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _host_command(torch: Path, unit: str, flags: list[str], output: str) -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    return [
        *compiler,
        *HOST_FLAGS,
        *flags,
        *extra,
        f"-I{torch}/include",
        "-c",
        str(CSRC / unit),
        "-o",
        output,
    ]


def build_all(out: Path) -> list[Path]:
    """Compile what can be compiled here into ``out``; returns the libraries. Says in one line each what is left out and why.

    Raises:
        RuntimeError: torch's headers or the compiler are missing, or a compile failed.
    """
    if sys.platform != "linux":
        say(f"no native libraries on {sys.platform}: the reference backend serves every operator")
        return []
    torch = find_torch()
    if torch is None:
        raise RuntimeError("ditscale needs the headers of torch >= 2.10: install torch first, or build with isolation")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if shutil.which(compiler[0]) is None:
        raise RuntimeError(f"ditscale needs a C++17 compiler: {compiler[0]} is not on the PATH (set CXX to another)")
    nvcc = find_nvcc()
    if os.environ.get("DITSCALE_SKIP_CUDA") == "1":
        nvcc = None
        say("DITSCALE_SKIP_CUDA=1: libditscale_cuda is left out")
    elif nvcc is None:
        say("no nvcc found: libditscale_cuda is left out; set CUDA_HOME to build it")
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:

        def place(unit: str) -> str:
            return str(Path(folder) / (unit.replace("/", "_") + ".o"))

        commands = [_host_command(torch, unit, flags, place(unit)) for unit, flags in CPU_UNITS.items()]
        if nvcc is not None:
            archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
            flags = [
                "-std=c++17",
                "-O3",
                "-Xcompiler=-fPIC,-fvisibility=hidden",
                "-ccbin",
                compiler[0],
                *archs,
            ]
            # Ahead of the host's: they take the longest.
            commands = [[str(nvcc), *flags, "-c", str(CSRC / u), "-o", place(u)] for u in CUDA_KERNELS] + commands
            commands += [_host_command(torch, unit, [], place(unit)) for unit in CUDA_BINDINGS]
        _run_all(commands)
        with_torch = [f"-L{torch}/lib", "-ltorch_cpu"]
        _link([*compiler, *LINK_FLAGS, *map(place, CPU_UNITS), *with_torch], out / "libditscale_cpu.so")
        cuda_library = out / "libditscale_cuda.so"
        if nvcc is None:
            cuda_library.unlink(missing_ok=True)
        else:
            objects = list(map(place, CUDA_KERNELS + CUDA_BINDINGS))
            linker = [str(nvcc), "-shared", "-cudart=static", "-ccbin", compiler[0], "-Xlinker=-s"]
            _link([*linker, *objects, *with_torch, "-ldl"], cuda_library)
    built = sorted(out.glob("libditscale_*.so"))
    say(f"built {' and '.join(p.name for p in built)} in {time.monotonic() - start:.0f} s")
    return built


def build_emulated(out: Path) -> Path:
    """The CUDA kernels compiled for the host (csrc/cuda/host_shim.h) as operators of their own, for tests without a GPU."""
    torch = find_torch()
    if torch is None:
        raise RuntimeError("no torch to build against")
    target = out / "libditscale_emulated.so"
    with tempfile.TemporaryDirectory() as folder:
        objects, commands = [], []
        for unit in CUDA_KERNELS + CUDA_BINDINGS:
            objects.append(str(Path(folder) / (unit.replace("/", "_") + ".o")))
            # The least optimisation that keeps the run short: the compile is most of the cost.
            command = _host_command(torch, unit, ["-O1", "-DDITSCALE_HOST_SHIM", "-Wno-unknown-pragmas"], objects[-1])
            commands.append([*command[:-4], "-x", "c++", *command[-4:]])
        _run_all(commands)
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        _link([*compiler, *LINK_FLAGS, *objects, f"-L{torch}/lib", "-ltorch_cpu"], target)
    return target
