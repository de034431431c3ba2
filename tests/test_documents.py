"""The README and the examples do what they say: their code runs, their links lead somewhere, their numbers are the code's."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if "RunTable" not in b], ids=lambda b: b.split("import")[0][-24:].strip()
)
def test_readme_code_runs(block):
    exec(compile(block, "README.md", "exec"), {})


def test_readme_flops_are_the_counter_s():
    from ditscale.dit import DiTConfig
    from ditscale.dit.flops import count

    report = count(DiTConfig.preset("DiT-XL/2"), image_size=256)
    for number in (report.forward, report.train, report.params.per_token, report.params.total):
        assert str(number) in README


def test_readme_fits_run():
    # The README reads a demo's folder; the runs of one stand in a file.
    (block,) = (b for b in BLOCKS if "RunTable" in b)
    there = f'RunTable.read("{ROOT / "examples/emoji_runs.csv"}", where="role == \'fit\'", '
    code = block.replace('RunTable.read("demo", ', there)
    assert code != block
    seen: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), seen)
    low, high = seen["forecast"].interval_95
    assert low < seen["forecast"].value < high


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def test_guides_code_runs(tmp_path, monkeypatch):
    """The snippets of each guide, one after the other as a reader would; those of a trained study need one."""
    import torch
    from PIL import Image

    from ditscale.dit import DiT, DiTConfig

    (tmp_path / "photos").mkdir()
    for i in range(40):
        Image.new("RGB", (70, 80), (i, 2 * i, 3 * i)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    small = DiTConfig.preset("DiT-S/8")
    given = {
        "docs/flops.md": {"torch": torch,
            "model": DiT(small), "x": torch.randn(1, 4, 32, 32), "t": torch.ones(1), "y": torch.zeros(1, dtype=torch.int64),
            "config": small, "batch": 8, "seconds": 0.5,
        }
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    ran = 0
    for page in ("docs/data.md", "docs/flops.md", "docs/kernels.md", "docs/models.md"):
        names = dict(given.get(page, {}))
        for code in snippets(page):
            exec(compile(code, page, "exec"), names)
            # What a comment says that a line gives, in quotes, it gives.
            for line, said in re.findall(r'^(\S+)  # (".*")$', code, flags=re.MULTILINE):
                assert repr(eval(line, names)) == repr(eval(said)), line
                ran += 1
    assert ran


PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]


def commands_in(text: str) -> set[str]:
    """Every ``ditscale ...`` that a page tells its reader to type, in blocks and between backticks."""
    fences = re.findall(r"^```(?:|sh|bash)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [re.split(r"\s{2,}|\s# ", line)[0] for block in fences for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", text)
    found = (re.search(r"(?:^|-m )ditscale (?!\.)(.*)", line.strip()) for line in lines)
    return {match.group(1) for match in found if match}


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist_with_their_options(page):
    import typer

    from ditscale import cli

    cli._gather()
    root = typer.main.get_command(cli.app)
    for text in commands_in((ROOT / page).read_text(encoding="utf-8")):
        words = text.replace("[", " ").replace("]", " ").split()
        commands = [root]
        while words and hasattr(commands[0], "commands"):
            commands = [commands[0].commands[name] for name in words.pop(0).split("|")]  # KeyError: no such command
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            for command in commands:
                assert option in {o for p in command.params for o in p.opts}, f"{page}: ditscale {text}: {option}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", text, flags=re.MULTILINE))
    assert {a or b for a, b in named} <= targets


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_what_make_clean_removed_is_built_again(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").mkdir()
    for name in ("setup.py", "pyproject.toml", "constraints.txt", ".venv/.ready", ".venv/.demo"):
        (tmp_path / name).touch()

    def make(*words):
        return subprocess.run(["make", *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "pip install" not in make("-n", "test") + make("-n", "demo")
    make("clean")
    assert "pip install" in make("-n", "test") and "pip install" in make("-n", "demo")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


# In this process, which has most of their imports; the others train, one of them by torchrun.
HERE = ["diffusers_kernels.py", "own_block.py"]


@pytest.mark.parametrize("script", HERE)
@pytest.mark.filterwarnings("ignore")
def test_examples_run_here(script, capsys):
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert capsys.readouterr().out


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py") if p.name not in HERE))
def test_examples_run(script):
    done = subprocess.run([sys.executable, str(ROOT / "examples" / script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_example_configurations_are_possible():
    from ditscale.dit.config import read_toml
    from ditscale.dit.training import TrainConfig
    from ditscale.scaling.study import StudyConfig, design

    assert TrainConfig.from_dict(read_toml(ROOT / "examples/train.toml")).steps > 100
    for name in ("study.toml", "study_h100.toml"):
        config = StudyConfig.from_toml(ROOT / "examples" / name)
        assert len(design(config)) == len(config.budgets) * config.sizes, name
