"""The libraries use torch's C shim only, and a wheel holds ditscale and nothing generic."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "ditscale" / "lib"
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What the libraries may leave to others: torch's C shim, libc and its kin (versioned), the C++ runtime, the loader's own.
SHIM = re.compile(r"^(aoti_torch_|torch_)\w+$")
VERSIONED = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC|GOMP|OMP)_[\w.]+$")
LOADER = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def libraries() -> list[Path]:
    found = sorted(LIB.glob("libditscale_*.so"))
    if not found:
        pytest.skip("no library built in this checkout")
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    return found


def undefined(path: Path) -> list[str]:
    out = subprocess.run(["nm", "-D", "--undefined-only", str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in out.splitlines()]


@pytest.mark.native
def test_only_the_c_shim_of_torch():
    for path in libraries():
        symbols = undefined(path)
        assert any(SHIM.match(s) for s in symbols), f"{path.name} uses no torch at all?"
        strange = [s for s in symbols if not (SHIM.match(s) or VERSIONED.search(s) or s in LOADER)]
        assert not strange, f"{path.name}: {strange[:5]}"
        text = subprocess.run(["nm", "-DC", "--undefined-only", str(path)], capture_output=True, text=True).stdout
        assert not re.findall(r".*(?:c10::|at::|torch::).*", text), path.name


@pytest.mark.native
def test_libraries_need_no_cuda_to_load():
    for path in libraries():
        # Anything of libtorch_cuda or libcuda here would keep the file from loading beside a CPU-only torch.
        assert not [s for s in undefined(path) if "cuda" in s.lower()], path.name
        needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
        libs = re.findall(r"NEEDED.*\[(.*?)\]", needed)
        assert not [n for n in libs if "cuda" in n or "nv" in n], libs


@pytest.mark.native
def test_nothing_but_registration_is_exported():
    for path in libraries():
        out = subprocess.run(["nm", "-D", "--defined-only", str(path)], capture_output=True, text=True).stdout
        names = {line.split()[-1] for line in out.splitlines() if " T " in line}
        ours = {n for n in names if not n.startswith("_Z")}
        assert ours <= {"ditscale_cpu_isa"} | {n for n in ours if n.startswith(("_init", "_fini"))}, ours


def test_dependencies_and_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.10"
    names = {re.split(r"[\s<>=;\[]", d)[0] for d in project["dependencies"]}
    assert names == {
        "matplotlib", "numpy", "pillow", "pyarrow", "rich", "safetensors", "scipy", "tomli", "torch", "typer"
    }  # fmt: skip
    assert project["scripts"] == {"ditscale": "ditscale.cli:main"}


def test_links_are_committed_and_relative():
    for room in ("kernels", "dit", "scaling", "bench"):
        link = ROOT / "ditscale" / room
        if not link.is_symlink():
            pytest.skip("an unpacked sdist holds the rooms themselves")
        assert os.readlink(link) == f"../{room}"


def test_the_backend_asks_for_torch_only_where_there_is_none(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "build"))
    import ditscale_backend
    import native_build

    assert not [r for r in ditscale_backend.get_requires_for_build_wheel() if r.startswith("torch")]
    monkeypatch.setattr(native_build, "find_torch", lambda: None)
    assert "torch>=2.10" in ditscale_backend.get_requires_for_build_wheel()
    assert "torch>=2.10" in ditscale_backend.get_requires_for_build_editable()


def test_what_is_left_out_is_said_in_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "build"))
    import native_build

    monkeypatch.setattr(native_build, "_run_all", lambda commands: None)
    monkeypatch.setattr(native_build, "_link", lambda command, target: target.touch())
    monkeypatch.setenv("DITSCALE_SKIP_CUDA", "1")
    assert [p.name for p in native_build.build_all(tmp_path)] == ["libditscale_cpu.so"]
    assert "DITSCALE_SKIP_CUDA" in capsys.readouterr().err
    monkeypatch.delenv("DITSCALE_SKIP_CUDA")
    monkeypatch.setattr(native_build, "find_nvcc", lambda: None)
    native_build.build_all(tmp_path)
    message = capsys.readouterr().err
    assert "no nvcc" in message and message.count("left out") == 1


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    """Both build from a copy of the checkout; the libraries are not compiled again (a stub stands for the compiler)."""
    copy = tmp_path / "src"
    left = {".git", ".venv", "build", "dist", "demo"}

    def ignore(folder: str, names: list[str]) -> set[str]:
        mine = {n for n in names if n == "__pycache__" or n.endswith((".egg-info", ".so"))}
        return mine | (left & set(names) if Path(folder) == ROOT else set())

    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    stub = "from pathlib import Path\ndef build_all(out):\n out.mkdir(parents=True, exist_ok=True)\n"
    stub += " (out / 'libditscale_cpu.so').write_bytes(b'')\n return []\ndef find_torch():\n return None\n"
    (copy / "tools/build/native_build.py").write_text(stub)
    for hook in ("build_sdist", "build_wheel"):
        script = f"import setuptools.build_meta as b, sys; b.{hook}(sys.argv[1])"
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"ditscale-[\d.]+-py3-none-(linux|manylinux)\w*\.whl", wheel.name), wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"ditscale"}, tops
    for needed in (
        "ditscale/kernels/adaln/op.py",
        "ditscale/dit/flops.py",
        "ditscale/lib/libditscale_cpu.so",
        "ditscale/py.typed",
        "ditscale/dit/data/assets/ATTRIBUTION.md",
        "ditscale/dit/evaluation/assets/scene_network.safetensors",
        "ditscale/scaling/page/page.css",
        "ditscale/bench/budgets/adaln.jsonl",
    ):
        assert needed in names, needed
    # The licences of the data stand where a packager looks for them, beside the project's own.
    licences = {n.split("/licenses/")[1] for n in names if ".dist-info/licenses/" in n}
    texts = {f"ditscale/dit/data/assets/LICENSE-{name}.txt" for name in ("Apache-2.0", "MIT", "Unicode-3.0")}
    assert licences == {"LICENSE", "NOTICE", "ditscale/dit/data/assets/ATTRIBUTION.md", *texts}
    (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    facts = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "License-Expression: Apache-2.0 AND MIT AND Unicode-3.0" in facts and "Typing :: Typed" in facts
    assert "Requires-Python: >=3.10" in facts and "Provides-Extra: triton" in facts
    assert not [n for n in names if "test" in n.split("/")[-1] and not n.startswith("ditscale/bench/")], "tests inside"
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".tmp")) or "__pycache__" in n]
    (sdist,) = tmp_path.glob("*.tar.gz")
    listing = subprocess.run(["tar", "tzf", str(sdist)], capture_output=True, text=True, check=True).stdout
    for needed in (
        "csrc/cpu/adaln_rows.inl",
        "csrc/cuda/norm.cu",
        "tools/build/ditscale_backend.py",
        "setup.py",
    ):
        assert needed in listing, needed
    assert ".so" not in listing
