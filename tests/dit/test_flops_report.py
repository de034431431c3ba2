"""How a report is read: JSON, text, Markdown, tree, and the command line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from ditscale.dit import DiTConfig
from ditscale.dit.flops import count
from ditscale.dit.ledger import OPERATIONS

XL = DiTConfig.preset("DiT-XL/2")


def test_json_holds_what_users_rely_on() -> None:
    content = json.loads(json.dumps(count(XL, batch=2).to_json()))
    for name in (
        "model",
        "tokens",
        "batch",
        "params",
        "forward_flops",
        "backward_flops",
        "train_flops",
        "forward_macs",
    ):
        assert name in content
    assert content["convention"] == "matmul"
    assert content["params"].keys() >= {"total", "per_token", "per_sample"}
    assert sum(line["forward"] for line in content["ledger"]) == content["forward_flops"]
    assert all(line["bytes_moved"] > 0 for line in content["ledger"])


def test_operation_classes() -> None:
    report = count(XL, convention="all", optimizer="adamw")
    assert {line.operation for line in (*report.ledger, *report.extras)} == set(OPERATIONS) - {"norm"}
    plain = count(DiTConfig.preset("DiT-XL/2-in-context"), convention="all")
    assert "norm" in plain.by_operation() and "modulation" in plain.by_operation()
    assert sum(forward for forward, _ in report.by_operation().values()) == report.forward


def test_sums_are_checked() -> None:
    report = count(XL)
    with pytest.raises(ValueError, match="add up"):
        dataclasses.replace(report, forward=report.forward + 1)


def test_tree_sums_by_module() -> None:
    report = count(XL)
    tree = report.tree()
    assert (tree["forward"], tree["backward"]) == (report.forward, report.backward)
    blocks = tree["parts"]["blocks"]
    assert blocks["forward"] == sum(x.forward for x in report.ledger if x.name.startswith("blocks."))
    assert blocks["parts"]["attn"]["parts"]["qkv"]["forward"] == report.line("blocks.attn.qkv").forward
    with pytest.raises(KeyError):
        report.line("nothing")


def test_text_and_markdown_name_their_convention() -> None:
    report = count(XL)
    assert "convention matmul" in str(report) and "711,718,502,400" in str(report)
    page = report.to_markdown()
    assert "`matmul`" in page
    assert len({line.count("|") for line in page.splitlines() if line.startswith("|")}) == 1


def command(*arguments: str) -> str:
    from typer import Typer

    from ditscale.dit.commands import register

    app = Typer()
    register(app)
    result = CliRunner().invoke(app, ["flops", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_command_line() -> None:
    content = json.loads(command("DiT-XL/2", "--image-size", "256", "--json", "--compare"))
    assert content["train_flops"] == 711_718_502_400 and content["forward_flops"] == 237_242_843_136
    assert {row["convention"] for row in content["compare"]} > {"6ND:total", "dit_paper_macs", "all"}
    assert json.loads(command("Wan2.1-1.3B", "--image-size", "240x416", "--json"))["tokens"] == 21 * 15 * 26
    assert (
        json.loads(command("DiT-S/2", "--convention", "hardware", "--recompute", "block", "--json"))["recompute_flops"]
        > 0
    )
    assert "| total |" in command("DiT-S/8", "--markdown")
    assert "6ND:total" in command("DiT-S/8", "--compare")
    assert "blocks.attn.qkv" in command("DiT-S/8")


@pytest.mark.parametrize("size", ["-1", "axb", "1x2x3", "255"])
def test_mistakes_are_one_line(size: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "ditscale", "flops", "DiT-S/2", "--image-size", size],
        env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2 and len(run.stderr.strip().splitlines()) == 1 and "size" in run.stderr
