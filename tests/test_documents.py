"""The README and the examples do what they say: their code runs, their links lead somewhere, their numbers are the code's."""

from __future__ import annotations

import re
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


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
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
