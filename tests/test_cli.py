"""The command line: JSON alone on stdout, one line and exit code 2 for a mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer

from ditscale import cli

CONFIG = """
batch = 4
images = 24
evaluation_images = 8
lr = 0.01

[model]
image_size = 16
latent_factor = 1
in_channels = 3
patch = 4
width = 16
depth = 1
heads = 2
condition = "class"
num_classes = 9
learn_sigma = false
"""


@pytest.fixture
def ditscale(run):
    """In this process, with the exit code that is expected."""

    def call(*arguments, code=0):
        found, out, err = run(*arguments)
        assert found == code, err
        return SimpleNamespace(stdout=out, stderr=err)

    return call


def test_as_a_program_of_its_own():
    def program(*arguments):
        command = [sys.executable, *(["-P"] if sys.version_info >= (3, 11) else []), "-m", "ditscale", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    done = program("flops", "DiT-XL/2", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["forward_flops"] == 237_242_843_136, done.stderr
    for arguments in (["nonsense"], ["sample", "nowhere", "--out", "x.png"]):
        done = program(*arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr


def test_flops_prints_the_ledger(ditscale):
    out = json.loads(ditscale("flops", "DiT-XL/2", "--image-size", 256, "--json").stdout)
    assert out["forward_flops"] == 237_242_843_136 and out["train_flops"] == 711_718_502_400
    assert out["convention"] == "matmul" and sum(line["forward"] for line in out["ledger"]) == out["forward_flops"]
    # Without a terminal, too, every number stands there whole.
    out = ditscale("flops", "DiT-XL/2", "--image-size", 512).stdout
    assert "train = 3,147,191,451,648 FLOPs   convention: matmul" in out
    assert "1,049,076,596,736" in out and "…" not in out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("flops", "DiT-XXXL/3"), "DiT-XXXL/3"),
        (("flops", "DiT-XL/2", "--image-size", "-1"), "image_size"),
        (("flops", "nowhere.toml"), "nowhere.toml"),
        (("flops", "DiT-XL/2", "--batch", "many"), "batch"),
        (("nonsense",), "nonsense"),
        (("train", "nowhere.toml", "--out", "x"), "nowhere.toml"),
        (("sample", "nowhere", "--out", "x.png"), "nowhere"),
        (("report", "/nonexistent"), "/nonexistent"),
        (("study", "status", "/nonexistent"), "/nonexistent"),
        (("study", "run", "nowhere.toml"), "--out"),
        (("flops", "DiT-XL/2", "--batch", "many"), "got 'many'"),
        (("flops", "DiT-XL/2", "--batch=many"), "got 'many'"),
        (("flops", "x" * 9000), " ... "),
        (("plan", "--law", "x" * 9000, "--budget", "1e20"), "name too long"),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_code_2(ditscale, arguments, named):
    done = ditscale(*arguments, code=2)
    assert done.stdout == "" and done.stderr.count("\n") == 1 and named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [(), ("fit",), ("study",), ("bench",)], ids=" ".join)
def test_no_command_is_a_mistake_that_shows_the_help(ditscale, command):
    done = ditscale(*command, code=2)
    assert "Usage" in done.stdout and done.stderr.startswith("ditscale: expected a command, got none")
    assert done.stderr.count("\n") == 1


def test_names_to_type_are_whole_on_a_narrow_terminal(ditscale, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert "vonruette2025-high-uniform" in ditscale("laws").stdout
    assert "gate_residual_layernorm_modulate" in ditscale("doctor").stdout


def test_doctor_cuts_nothing_on_a_narrow_terminal(ditscale, monkeypatch):
    from ditscale.kernels import doctor

    facts = doctor.report()
    because = "no such file: /opt/[old]/a:smile:b/" + "x" * 90 + " [/gone]"
    facts["libraries"]["libditscale_cuda"] |= {"available": False, "reason": because}
    facts["operators"]["attention"]["triton"] = {"available": False, "reason": because}
    facts["checks"] = [
        {
            "operator": "linear",
            "backend": "cpu",
            "dtype": "float32",
            "device": "cpu",
            "passed": False,
            "reason": because,
        }
    ]
    monkeypatch.setattr(doctor, "report", lambda check: facts)
    monkeypatch.setenv("COLUMNS", "40")
    out = ditscale("doctor", "--check", code=1).stdout
    reasons = [row["reason"] for rows in facts["operators"].values() for row in rows.values() if row["reason"]]
    assert out.count(because) == 3 and all(f" {reason}\n" in out for reason in reasons), out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not there")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_behind_stdout_is_one_line(unbuffered):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ditscale", "version"]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("ditscale: stdout: "), done


@pytest.mark.parametrize(("redirection", "model", "code"), [(">&-", "DiT-S/2", 0), (">&- 2>&-", "nowhere", 2)])
def test_a_closed_stream_is_no_fault(redirection, model, code):
    command = ["sh", "-c", f'exec "$0" -m ditscale flops {model} {redirection}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_locale_of_few_letters_shows_the_others_as_escapes():
    command = [sys.executable, "-m", "ditscale", "flops", "DiT-S/2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "") and "2\\xb7B\\xb7T" in done.stdout, done.stderr


def test_ctrl_c_is_one_line(run, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ditscale.dit.flops.count", stop)
    code, out, err = run("flops", "DiT-XL/2")
    assert (code, out) == (130, "") and err.endswith("ditscale: stopped\n") and "goes on" not in err
    monkeypatch.setattr(cli, "_gather", stop)
    assert run("version") == (130, "", "ditscale: stopped\n")


def test_the_version_is_printed(ditscale):
    from ditscale import __version__

    assert ditscale("--version").stdout == ditscale("version").stdout == f"{__version__}\n"


def test_a_demo_into_a_foreign_folder_changes_nothing(ditscale, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    assert "letter.txt" in ditscale("demo", "--out", tmp_path, code=2).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_train_sample_evaluate_export(ditscale, tmp_path):
    (tmp_path / "config.toml").write_text(CONFIG)
    run = tmp_path / "run"
    record = json.loads(ditscale("train", tmp_path / "config.toml", "--out", run, "--threads", 1, "--json").stdout)
    assert record["status"] == "finished" and record["images"] == 24
    again = json.loads(ditscale("evaluate", run, "--json").stdout)
    assert again["loss"] == record["loss"] and again["loss_by_timestep"] == record["loss_by_timestep"]
    ditscale("sample", run, "--out", tmp_path / "s.png", "--label", 3, "--label", 5, "--steps", 2)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "--label" in ditscale("sample", run, "--out", tmp_path / "t.png", "--label", 9, code=2).stderr
    assert json.loads(ditscale("export", run, "--out", tmp_path / "m.safetensors", "--json").stdout)["tensors"] > 10
    # Another configuration must not touch the run; a finished run is handed back.
    (tmp_path / "other.toml").write_text(CONFIG.replace("0.01", "0.02"))
    assert "another run" in ditscale("train", tmp_path / "other.toml", "--out", run, code=2).stderr
    assert json.loads((run / "run.json").read_text()) == record


def test_no_help_text_loses_words_to_markup():
    """What stands in square brackets is a style to the help page, and is not shown."""
    cli._gather()
    waiting, texts = [typer.main.get_command(cli.app)], {}
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        texts[command.name] = command.help or ""
        texts |= {f"{command.name} {p.name}": getattr(p, "help", None) or "" for p in command.params}
    assert "train config" in texts and "study" in texts
    assert not {name: text for name, text in texts.items() if re.search(r"\[[a-z/#@]", text)}


def test_a_command_that_needs_torch_says_so_where_there_is_none(ditscale, monkeypatch):
    # The counter and the laws need none, and so may live without one.
    for name in [n for n in sys.modules if n.startswith("ditscale.kernels.doctor")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert ditscale("doctor", code=2).stderr == (
        "ditscale: torch: expected to be installed for this command, got none (pip install torch)\n"
    )
    assert "forward_flops" in ditscale("flops", "DiT-XL/2", "--json").stdout
