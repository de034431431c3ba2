"""The command line: the contract's keys, one JSON object, one line and exit code 2 for a mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from law_helpers import cells as _cells
from law_helpers import lawdata, study

from ditscale.scaling import RunTable
from ditscale.scaling.gpus import peak_flops
from ditscale.scaling.registry import PUBLISHED


def _write(table: RunTable, path: Path) -> Path:
    lines = [",".join(table.columns)]
    lines += [",".join(repr(float(v)) for v in row) for row in zip(*table.columns.values(), strict=True)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _write(study(noise=0.004), tmp_path / "runs.csv")


def test_fit_surface_on_the_public_table(run) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(
        *("fit", "surface", lawdata("epoch_chinchilla_svg_extracted_data.csv")),
        *("--params", "Model Size", "--flops", "Training FLOP", "--tokens-from-6nd", "--loss", "loss"),
        *("--drop-highest", 5, "--loss-fn", "huber:1e-3", "--space", "log", "--bootstrap", 1000, "--seed", 0),
        "--json",
    )
    assert (code, err) == (0, "")
    o = json.loads(out)
    contract = "n objective E A B alpha beta a b converged starts_agreeing intervals sd seconds"
    assert set(contract.split()) <= set(o)
    assert o["n"] == 240 and o["converged"]
    assert o["objective"] == pytest.approx(0.001018274017801, rel=1e-9)
    assert set(o["seconds"]) == {"fit", "bootstrap"}
    assert 0.0138 < o["sd"]["alpha"] < 0.0166


def test_fit_surface_isoflop_power(run, file: Path) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = run("fit", "surface", file, "--json")
    assert code == 0 and out.count("\n") == 1
    surface = json.loads(out)
    assert surface["alpha"] == pytest.approx(0.34, abs=0.03)
    code, out, _ = run(
        *("fit", "isoflop", file, "--budget", "budget", "--params", "params", "--tokens", "tokens"),
        *("--loss", "loss", "--vertex", "cubic", "--json"),
    )
    o = json.loads(out)
    assert code == 0
    assert {"N_exponent", "N_coefficient", "D_exponent", "D_coefficient", "optima", "warnings"} <= set(o)
    assert len(o["optima"]) == 5
    assert {"budget", "params", "tokens", "loss", "bracketed"} <= set(o["optima"][0])
    for floor in ("free", "none", 1.5):
        where = "`params` > 0 and budget >= 1e17"
        code, out, _ = run(
            "fit", "power", file, "--x", "flops", "--y", "loss", "--floor", floor, "--where", where, "--json"
        )
        o = json.loads(out)
        assert code == 0 and {"exponent", "coefficient", "floor", "r2", "intervals", "warnings"} <= set(o)
    assert o["floor"] == 1.5


def test_plan_on_a_published_and_on_a_saved_law(run, file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    o = json.loads(run("plan", "--law", "liang2024", "--budget", "1.5e21", "--json")[1])
    assert {"params", "tokens", "loss", "fid", "source"} <= set(o)
    saved = tmp_path / "surface.json"
    saved.write_text(run("fit", "surface", file, "--json")[1])
    code, out, _ = run("plan", "--law", saved, "--budget", 1e20, "--gpu", "h100", "--json")
    o = json.loads(out)
    assert code == 0 and o["intervals"]["loss"][0] < o["loss"] < o["intervals"]["loss"][1]


def test_the_other_commands_answer(run, file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    second = _write(study(noise=0.004, seed=1), tmp_path / "second.csv")
    for arguments in (
        ("backtest", file),
        ("backtest", file, "--by", "params", "--law", "surface", "--law", "skaling"),
        ("compare", file, second, "--target", 1e21),
        ("predict", file, "--flops", 1e20, "--params", 8e8),
        ("suggest", file, "--target", 1e21, "--spend", 1e20),
        ("laws",),
        ("fit", "power", file, "--y", "loss", "--feature-network", "inception-v3", "--samples", 50000),
        ("fit", "hparams", _write(_cells(noise=0.001), tmp_path / "cells.csv"), "--bootstrap", 100),
    ):
        code, out, err = run(*arguments, "--json")
        assert (code, err) == (0, ""), arguments
        assert isinstance(json.loads(out), dict)
        code, out, _ = run(*arguments)
        assert code == 0 and len(out) > 80


def test_laws_are_listed_whole(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "40")
    out = run("laws")[1]
    for law in PUBLISHED.values():
        assert f"{law.name}\n  {law.title}\n" in out and f"  {law.source}\n" in out
    assert "holds params (1 digit), tokens (7 digits), loss (5 digits), fid (5 digits) as printed" in out


def test_a_comparison_takes_the_same_rows_of_both(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    # A study's own table also has the predicted run, alone at its budget.
    for name, seed in (("plain", 0), ("better", 1)):
        table = study(noise=0.004, seed=seed)
        lone = {"params": 1e9, "tokens": 1e11, "flops": 6e20, "loss": 2.2, "budget": 6e20}
        columns = {k: [*table.columns[k].tolist(), lone[k]] for k in table.columns}
        _write(RunTable.from_columns(columns), tmp_path / f"{name}.csv")
    files = [tmp_path / "plain.csv", tmp_path / "better.csv"]
    assert "got 1" in run("compare", *files)[2]
    code, out, _ = run("compare", *files, "--where", "budget < 1e20", "--law", "surface-tied", "--json")
    o = json.loads(out)
    assert code == 0 and o["names"] == ["plain", "better"] and o["target"] < 1e20


def test_other_names_of_columns(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    table = study(noise=0.004)
    names = {"params": "N", "tokens": "D", "flops": "C", "loss": "L", "budget": "B"}
    renamed = RunTable.from_columns({names[k]: v for k, v in table.columns.items()}, **names)
    plain, other = _write(table, tmp_path / "plain.csv"), _write(renamed, tmp_path / "other.csv")
    for flops, *rest in (
        ("--compute", "predict", "--flops", 1e20, "--params", 8e8, "--law", "surface"),
        ("--flops", "suggest", "--target", 1e21, "--spend", 1e20),
    ):
        shared = ("--size", "N", flops, "C", "--loss", "L", "--budget", "B")
        code, out, err = run(*rest, other, "--tokens", "D", *shared)
        assert (code, err) == (0, "") and out == run(*rest, plain)[1]
        assert run(*rest, other, "--tokens-from-6nd", *shared)[0] == 0
    given = ("--params", "N", "--flops", "C", "--loss", "L", "--budget", "X")
    assert "budget: expected a column" in run("draw", other, "--out", tmp_path / "x", "--tokens", "D", *given)[2]


def test_losses_without_scaling(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Losses that are all the same, that rise with size, or that leave the range of floats: an answer or one line."""
    table = study(noise=0.004)
    for name, loss in (
        ("plain", table.loss),
        ("same", np.full(len(table), 0.5)),
        ("rising", 0.5 * table.params**0.1),
        ("huge", table.loss * 1e300),
    ):
        _write(RunTable.from_columns({**table.columns, "loss": loss}), tmp_path / f"{name}.csv")
    for kind in ("surface", "isoflop", "power"):
        code, out, err = run("fit", kind, tmp_path / "same.csv", *(("--bootstrap", 0) if kind == "isoflop" else ()))
        assert (code, err) == (0, "") and "no scaling in this range" in out
        code, out, err = run("fit", kind, tmp_path / "huge.csv")
        assert (code, out, err.count("\n")) == (2, "", 1) and "expected values that the law can come near" in err
    assert run("fit", "isoflop", tmp_path / "rising.csv", "--bootstrap", 0)[0] == 0
    for arguments in (
        ("compare", tmp_path / "plain.csv", tmp_path / "same.csv"),
        ("suggest", tmp_path / "same.csv", "--target", 1e21, "--spend", 1e20),
        ("suggest", tmp_path / "rising.csv", "--target", 1e21, "--spend", 1e20),
    ):
        code, out, err = run(*arguments)
        assert (code, out, err.count("\n")) == (2, "", 1) and "no scaling in this range" in err


def test_the_size_that_was_taken_by_default_is_said(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    table = study(noise=0.004)
    columns = {**table.columns, "params_per_token": np.asarray(table.params) / 2}
    file = _write(RunTable.from_columns(columns), tmp_path / "runs.csv")
    assert "N is params, all of them" in run("fit", "surface", file)[1]
    for column in ("params", "params_per_token"):
        assert "N is params" not in run("fit", "surface", file, "--params", column)[1]


def test_summaries_are_readable(run, file: Path) -> None:  # type: ignore[no-untyped-def]
    for arguments in (("fit", "surface", file), ("fit", "isoflop", file), ("fit", "power", file)):
        code, out, _ = run(*arguments)
        assert code == 0 and "exponent" in out or "alpha" in out


def test_figures_of_a_saved_fit(run, file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    saved = tmp_path / "fit.json"
    saved.write_text(run("fit", "isoflop", file, "--bootstrap", 50, "--json")[1])
    code, out, err = run("draw", saved, "--out", tmp_path / "figures", "--json")
    assert (code, err) == (0, "")
    assert {Path(p).name for p in json.loads(out)["figures"]} == {p.name for p in (tmp_path / "figures").iterdir()}
    # From the table of runs in one go: the same curves, and the backtest besides.
    again = tmp_path / "again"
    code, out, err = run("draw", file, "--out", again, "--where", "budget < 1e20", "--json")
    assert (code, err) == (0, "")
    assert {p.name for p in again.iterdir()} == {p.name for p in (tmp_path / "figures").iterdir()} | {"backtest.svg"}
    assert "which is fitted already" in run("draw", saved, "--out", again, "--params", "params")[2]
    code, out, _ = run("fit", "power", file, "--feature-network", "clip-vit-l/14", "--json")
    assert json.loads(out)["feature_network"] == "clip-vit-l/14" and json.loads(out)["seed_noise"] == 0.01


BAD = [
    (("plan", "--law", "liang2024", "--budget", "-3"), "budget"),
    (("plan", "--law", "nobody2020", "--budget", "1e20"), "law"),
    (("plan", "--law", "liang2024", "--budget", "much"), "budget"),
    (("plan", "--law", "liang2024", "--budget", "1e20", "--gpu", "h100", "--gpus", "9" * 400), "gpus"),
    (("plan", "--law", "liang2024", "--budget", "1e20", "--batch", "9" * 400), "batch"),
    (("plan", "--law", "liang2024", "--budget", "1e20", "--aspect", "1e308"), "aspect"),
    (("plan", "--law", "liang2024", "--budget", "1e20", "--aspect", "1e-300"), "aspect"),
    (("plan", "--law", "liang2024", "--budget", "1e20", "--inference-images", "nan"), "inference-images"),
    (("fit", "surface", "/dev/null"), "empty file"),
    (("fit", "surface", __file__), "expected"),
    (("fit", "surface", "{file}", "--loss", "lost"), "lost"),
    (("fit", "surface", "{file}", "--loss-fn", "huber:-1"), "loss-fn"),
    (("fit", "surface", "{file}", "--space", "linear"), "space"),
    (("fit", "surface", "{file}", "--law", "straight"), "law"),
    (("fit", "surface", "{file}", "--where", "loss ="), "where"),
    (("fit", "surface", "{file}", "--bootstrap", "-1"), "bootstrap"),
    (("fit", "surface", "{file}", "--seed", "-1"), "seed"),
    (("fit", "isoflop", "{file}", "--bootstrap", "-1"), "bootstrap"),
    (("fit", "isoflop", "{file}", "--bootstrap", "9" * 20), "bootstrap"),
    (("fit", "isoflop", "{file}", "--seed", "-1"), "seed"),
    (("fit", "power", "{file}", "--seed", "-1"), "seed"),
    (("fit", "hparams", "{file}", "--bootstrap", "9" * 20), "bootstrap"),
    (("fit", "surface", "{file}", "--starts", "0"), "starts"),
    (("fit", "surface", "{file}", "--intervals", "prayer"), "intervals"),
    (("fit", "surface", "{file}", "--where", "budget == 1e17"), "at least 2 different budgets"),
    (
        ("fit", "isoflop", "{file}", "--where", "budget == 1e17"),
        "budget: expected at least 2 different budgets",
    ),
    (("fit", "isoflop", "{file}", "--vertex", "quartic"), "vertex"),
    (("fit", "power", "{file}", "--floor", "low"), "floor"),
    (("fit", "power", "{file}", "--floor", "99"), "floor"),
    (("fit", "power", "{file}", "--x", "nothing"), "nothing"),
    (("fit", "hparams", "{file}"), "lr"),
    (("backtest", "{file}", "--by", "luck"), "by"),
    (("predict", "{file}", "--flops", "1e20"), "two of params"),
    (("predict", "{file}", "--params", "1e308", "--data", "1e8"), "params"),
    (("predict", "{file}", "--data", "1e308", "--params", "1e8"), "tokens: expected"),
    (("coverage", "--draws", "1"), "draws"),
    (("plan", "--law", "{file}", "--budget", "1e20"), "expected JSON, as --json prints it"),
    (("plan", "--law", "liang2024", "--budget", "1e20", "--quality", "/nonexistent"), "expected a readable JSON file"),
    (("fit", "power", "{file}", "--y", "fid"), "fid: expected a column"),
    (("draw", "{file}", "--out", "/dev/null/x"), "out: expected a folder"),
    (("draw", "/dev/null", "--out", "x"), "empty file"),
    (("fit", "surface", "{file}", "--last-step"), "last-step"),
    (("fit", "power", "{file}", "--feature-network", "x", "--seed-noise", "-1"), "seed-noise"),
    (("fit", "power", "{file}", "--seed-noise", "-1"), "seed-noise: expected --feature-network"),
    (("fit", "power", "{file}", "--samples", "-5"), "samples: expected --feature-network"),
    (("fit", "power", "{file}", "--feature-network", "x", "--loss-fn", "l1"), "loss-fn: expected mse"),
    (("fit", "power", "{file}", "--feature-network", "x", "--seed", "3"), "seed: expected 0"),
    (("fit", "surface", "{file}", "--where", ""), "where: expected"),
    (("fit", "surface", "{file}", "--law", "repetition"), "--input unique=COLUMN"),
    (("predict", "{file}", "--params", "1e9", "--data", "1e10", "--flops", "1e21"), "flops: expected about 6e+19"),
    (("suggest", "{file}", "--target", "1e13", "--spend", "1e-5"), "spend: expected enough"),
    (("suggest", "{file}", "--target", "1e21", "--spend", "1e18", "--tokens", "lost"), "tokens: expected a column"),
]


@pytest.mark.parametrize(("arguments", "word"), BAD, ids=[" ".join(a)[:60] for a, _ in BAD])
def test_mistakes(run, file: Path, arguments: tuple[str, ...], word: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(*(a.replace("{file}", str(file)) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("ditscale: ") and err.count("\n") == 1 and word in err
    assert "Traceback" not in err


def test_full_precision_is_printed(run, file: Path) -> None:  # type: ignore[no-untyped-def]
    # Rounded laws predict worse (beta 0.28 for 0.2849 moves a term by 13 %): the JSON gives every digit back.
    o = json.loads(run("fit", "surface", file, "--json")[1])
    table = RunTable.read(file)
    predicted = o["E"] + o["A"] / table.params ** o["alpha"] + o["B"] / table.data ** o["beta"]
    residuals = np.log(predicted / table.loss)
    knee = o["saved"]["loss"]["scale"]
    size = np.minimum(np.abs(residuals), knee)
    assert (size * (np.abs(residuals) - 0.5 * size)).sum() == pytest.approx(o["objective"], rel=1e-10)


def test_a_grid_that_is_piped_has_every_number_whole(run, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("COLUMNS", "40")
    code, out, _ = run("study", "design", Path(__file__).parents[2] / "examples/study_h100.toml")
    assert code == 0 and "11,839,036" in out and "1,024,384" in out and "…" not in out


def test_a_study_s_hours_on_a_gpu(run) -> None:  # type: ignore[no-untyped-def]
    """What the grid and the predicted run take at a share of the GPU's peak: the given one, or 0.40, which is said."""
    toml = Path(__file__).parents[2] / "examples/study_h100.toml"
    for given, mfu, source in ((("--mfu", "0.3"), 0.3, "given"), ((), 0.4, "assumed, not measured")):
        code, out, err = run("study", "design", toml, "--gpu", "h100", *given, "--json")
        assert (code, err) == (0, "")
        found = json.loads(out)
        machine, rate = found["machine"], peak_flops("h100") * mfu
        assert (machine["gpu"], machine["mfu"], machine["mfu_source"]) == ("h100", mfu, source)
        assert machine["grid_hours"] == pytest.approx(sum(row["flops"] for row in found["grid"]) / rate / 3600)
        assert machine["target_hours"] == pytest.approx(found["target_budget"] / rate / 3600)
        code, out, _ = run("study", "design", toml, "--gpu", "h100", *given)
        hours = (
            f"{machine['grid_hours']:.3g} h and {machine['target_hours']:.3g} h on one h100 at MFU {mfu:.2f} ({source})"
        )
        assert code == 0 and hours in " ".join(out.split())
    code, out, _ = run("study", "design", toml, "--json")
    assert code == 0 and json.loads(out)["machine"] is None
    for given, said in (
        (("--mfu", "0.3"), "mfu: expected --gpu with it"),
        (("--gpu", "h100", "--mfu", "30"), "mfu: expected a share of the peak between 0 and 1, got 30.0"),
        (("--gpu", "h100", "--mfu", "-0.3"), "mfu: expected a positive number, got -0.3"),
        (("--gpu", "abacus"), "gpu: expected"),
    ):
        code, out, err = run("study", "design", toml, *given)
        assert (code, out) == (2, "") and said in err and err.count("\n") == 1
        assert "flops-per-second" not in err  # which this command lacks
