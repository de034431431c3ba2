"""The entries of the ahead-of-time table for the built CUDA library, which is taken apart; no GPU needed."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ditscale.bench import sass
from ditscale.bench.aot import Entry, families, resources_of, static_shared
from ditscale.errors import BackendUnavailable


def cuda_library() -> Path:
    """The built CUDA library.

    Raises:
        BackendUnavailable: it is not built.
    """
    from ditscale.kernels.library import path_of

    path = path_of("cuda")
    if not path.is_file():
        raise BackendUnavailable(f"{path.name} is not built here: python setup.py build_native --inplace, with nvcc")
    return path


def cuda_entries(known: dict[str, Entry] | None = None) -> list[Entry]:
    """The kernels of the built CUDA library, all architectures in it.

    Args:
        known: entries by fingerprint, whose resources are taken over instead of taking their code apart again.
    """
    known = known or {}
    path = cuda_library()
    compiler = f"nvcc {nvcc_version() or 'unknown'}"
    identities = sass.identities(path)
    prints = {key: f"{identity.digest} {compiler}" for key, identity in identities.items()}
    names = _demangled(sorted({name for _, name in prints}))
    new = sorted({name for (_, name), print_ in prints.items() if print_ not in known})
    allowed, asked = _cuda_stack(), sass.asked_shared(path)
    entries = []
    for arch, kernel in sass.read(path, functions=new):
        unit, function, case = names[kernel.name]
        print_ = prints[arch, kernel.name]
        old = known.get(print_)
        resources = dict(old.resources if old and old.resources else resources_of(kernel))
        # The code does not change with what is asked for beside it: never from the budget.
        resources["shared"] = static_shared(kernel, int(arch)) + asked.get((function, case), 0)
        threads = identities[arch, kernel.name].threads
        stack = allowed.get((function, case, arch), 0)
        entries.append(
            Entry(f"cuda-{unit}", case, function, arch, print_, threads, resources=resources, stack_bytes=stack)
        )
    return sorted(entries, key=lambda e: (e.family, e.kernel, e.case, int(e.arch)))


def _cuda_stack() -> dict[tuple[str, str, str], int]:
    """Local memory that a CUDA kernel may use, by function, template arguments and architecture, where its family says why."""
    found: dict[tuple[str, str, str], int] = {}
    for family in families():
        told = getattr(importlib.import_module(f"ditscale.kernels.{family}.aot"), "CUDA_STACK", {})
        found |= {key: stack_bytes for key, (stack_bytes, _) in told.items()}
    return found


def cuda_flop_efficiency(entries: Sequence[Entry]) -> dict[str, dict[int, float]]:
    """Useful over issued FLOPs of matrix products by head width, by key, of the kernels whose family tells of them.

    Args:
        entries: all kernels of the CUDA library: which heads one takes hangs on the others.
    """
    kernels = {(entry.kernel, entry.case) for entry in entries}
    told: dict[tuple[str, str], dict[int, float]] = {}
    for family in families():
        tell = getattr(importlib.import_module(f"ditscale.kernels.{family}.aot"), "cuda_flop_efficiency", None)
        told |= tell(kernels) if tell else {}
    return {entry.key: told[entry.kernel, entry.case] for entry in entries if (entry.kernel, entry.case) in told}


def nvcc_version() -> str | None:
    """Such as "13.0.88"; None where there is no nvcc."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    with contextlib.suppress(OSError):
        found = re.search(r"V([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
        return found[1] if found else None
    return None


def _demangled(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """Mangled name -> (source file, function, template arguments)."""
    if shutil.which("c++filt") is None:
        raise BackendUnavailable("c++filt is not here: it comes with binutils")
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = {}
    for name, plain in zip(names, text.splitlines(), strict=True):
        unit = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_", name)
        plain = plain.replace("(anonymous namespace)::", "").removeprefix("void ").replace("ditscale::cuda::", "")
        head = re.match(r"([\w:]+)(?:<(.*)>)?\(", plain)
        function, arguments = (head[1], head[2] or "") if head else (plain, "")
        arguments = re.sub(r"\((?:int|bool|unsigned int)\)", "", arguments)
        found[name] = (unit[1] if unit else "other", function, arguments)
    return found
