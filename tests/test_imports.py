"""Who may import whom, what importing costs, and that nothing generic is importable: DESIGN.md's rules as tests."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "ditscale"  # links to the rooms; in an unpacked sdist the rooms themselves
ROOMS = ("kernels", "dit", "scaling", "bench")
# What each room may import of the others. Half of scaling executes studies and so uses dit; the other half, the laws, is held
# to numpy and scipy by test_the_laws_need_no_torch.
ALLOWED = {"kernels": set(), "dit": {"kernels"}, "scaling": {"dit", "kernels"}, "bench": {"kernels", "dit", "scaling"}}
LIGHT = {"torch", "triton"}
PUBLIC = {
    "ditscale.kernels": {
        "attention",
        "attention_qkv",
        "bias_gelu",
        "gate_residual",
        "gate_residual_layernorm_modulate",
        "layernorm_modulate",
        "linear",
        "qk_norm_rope",
    },
}


def sources(room: str) -> list[Path]:
    return sorted(p for p in (HOME / room).rglob("*.py") if "__pycache__" not in p.parts)


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Full dotted names that a file imports; ``top_only``: what runs when the file itself is imported."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_only:
        nodes, queue = [], list(tree.body)
        while queue:
            node = queue.pop()
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                queue += node.orelse
                continue
            nodes.append(node)
            queue += list(ast.iter_child_nodes(node))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}: relative import; write ditscale.<room>"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_used(names: Iterator[str]) -> set[str]:
    return {n.split(".")[1] for n in names if n.startswith("ditscale.") and n.split(".")[1] in ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_downwards(room):
    assert sources(room), f"no sources in {room}"
    for path in sources(room):
        name = path.relative_to(ROOT).as_posix()
        allowed = ALLOWED[room]
        assert rooms_used(imports(path)) <= allowed | {room}, name


@pytest.mark.parametrize("room", ROOMS)
def test_nobody_imports_a_bare_room_or_the_tests(room):
    for path in sources(room):
        for name in imports(path):
            assert name.split(".")[0] not in {*ROOMS, "tests", "csrc"}, f"{path.relative_to(ROOT)} imports {name}"


def test_nobody_below_imports_the_benchmarks():
    for room in ("kernels", "dit", "scaling"):
        for path in sources(room):
            assert "bench" not in rooms_used(imports(path)), path


# A study is carried out by these modules of scaling; the others may know a model's configuration and its FLOPs, no more.
ENGINES = {"jobs", "local_pool", "on_ray", "slurm"}
STUDY = {"study", "execute", "conduct", "gallery", "demo_study", "study_commands", *ENGINES}
TORCH_FREE = {"ditscale.dit.config", "ditscale.dit.flops"}


def test_only_a_study_reaches_the_models():
    for path in sources("scaling"):
        names = {
            n for n in imports(path) if n.split(".")[0] in LIGHT or n.startswith(("ditscale.dit", "ditscale.kernels"))
        }
        foreign = {n for n in names if not any(n == m or n.startswith(f"{m}.") for m in TORCH_FREE)}
        foreign -= {"ditscale.dit"} if {"ditscale.dit.config", "ditscale.dit.flops"} & names else set()
        assert path.stem in STUDY or not foreign, f"{path.name}: {sorted(foreign)}"


def test_the_laws_need_no_torch():
    names = "RunTable, fit_isoflop, fit_power, fit_surface, plan"
    run(f"import sys; from ditscale.scaling import {names}; assert not {{'torch', 'triton'}} & set(sys.modules)")


def test_references_lean_on_no_kernel():
    found = sorted((HOME / "kernels").rglob("reference.py"))
    assert len(found) >= 4
    for path in found:
        for name in imports(path):
            assert not name.startswith("ditscale"), f"{path}: {name}"


def test_costs_import_nothing_of_weight():
    for path in sorted((HOME / "kernels").rglob("cost.py")):
        assert {n.split(".")[0] for n in imports(path)} <= {"__future__", "math"}, path


def test_commands_are_light():
    for room in ROOMS:
        for name in imports(HOME / room / "commands.py", top_only=True):
            top = name.split(".")[0]
            assert top in sys.stdlib_module_names or top == "typer" or name.startswith("ditscale.errors"), (
                room,
                name,
            )


def test_no_module_bears_the_name_of_its_public_function():
    # It breaks `import a.b.c as m`, and the one shadows the other on the package.
    for name in PUBLIC["ditscale.kernels"]:
        assert importlib.util.find_spec(f"ditscale.kernels.{name}") is None, name


def test_public_names_are_exact():
    import ditscale
    from ditscale import kernels

    assert set(kernels.__all__) == PUBLIC["ditscale.kernels"]
    assert all(callable(getattr(kernels, name)) for name in kernels.__all__)
    assert set(ditscale.__all__) == {"BackendUnavailable", "InputError", "__version__", *ROOMS}


def test_nothing_generic_is_importable(tmp_path):
    # The folder kernels/ would shadow Hugging Face's package of that name wherever the root is on sys.path: nothing that the
    # project controls may put it there, and an installed ditscale must not bring such a name.
    names = ("kernels", "dit", "scaling", "bench", "csrc")
    code = f"import importlib.util as u; assert not [n for n in {names} if u.find_spec(n)]"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert done.returncode == 0, done.stderr
    assert not (ROOT / "conftest.py").exists()
    by_command = {str(Path(p or ".").resolve()) for p in (*os.environ.get("PYTHONPATH", "").split(os.pathsep), "")}
    if str(ROOT) not in by_command:  # `python -m pytest` and PYTHONPATH put it there themselves
        assert not [n for n in names if importlib.util.find_spec(n)]


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, env=child_env()
    )
    assert done.returncode == 0, done.stderr


def child_env() -> dict[str, str]:
    import ditscale

    home = str(Path(ditscale.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))}


@pytest.mark.parametrize(
    "statement",
    [
        "import ditscale",
        "import ditscale.kernels",
        "import ditscale.scaling",
        "from ditscale.dit.flops import count",
        "from ditscale.kernels.adaln import cost",
        "from ditscale.kernels import commands",
        "import ditscale.cli",
    ],
)
def test_light_imports_stay_light(statement):
    run(f"import sys; {statement}; assert not {{'torch', 'triton'}} & set(sys.modules)")
