"""Plans: from a budget, a loss or a deadline to a run that exists, and what is not known said so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from law_helpers import CHINCHILLA, optimum, study

from ditscale.dit.config import DiTConfig
from ditscale.dit.flops import count
from ditscale.errors import InputError
from ditscale.scaling import RunTable, fit_isoflop, fit_surface, plan
from ditscale.scaling.configurations import counted, design_config
from ditscale.scaling.gpus import peak_flops
from ditscale.scaling.planner import machine_rate
from ditscale.scaling.study import Study, StudyConfig


def test_the_published_plan() -> None:
    p = plan("liang2024", budget=1.5e21)
    assert p.params == pytest.approx(958.3e6, rel=0.012)
    assert p.loss == pytest.approx(0.6325, abs=1e-4)
    assert p.fid == pytest.approx(25.0, abs=0.1)
    assert 6 * p.params * p.tokens / 1.5e21 == pytest.approx(1.009, abs=1e-3)
    assert "2410.08184" in p.source
    assert p.extrapolation == pytest.approx(250)
    assert p.intervals["loss"] is None and p.flatness is None  # the paper prints neither intervals nor a surface
    json.dumps(p.to_json(), allow_nan=False)


@pytest.mark.parametrize("kind", ["per_token", "total"])
@pytest.mark.parametrize("target", [1e6, 1e7, 1e8, 958.3e6, 5e9])
def test_configurations_exist_and_are_near(target: float, kind: str) -> None:
    config = design_config(target, params_kind=kind, head_width=32 if target < 2e6 else 64)
    assert config.width % config.heads == 0
    assert counted(config, kind) == pytest.approx(target, rel=0.2 if target < 2e7 else 0.05)
    assert 64 / 1.51 < config.width / config.depth < 64 * 1.51 or config.depth <= 2


def test_the_configuration_spends_the_budget_by_the_ledger() -> None:
    p = plan("liang2024", budget=1e20, batch=1024)
    c = p.configuration
    assert c is not None
    fields = {k: c[k] for k in ("width", "depth", "heads", "patch", "image_size", "latent_factor")}
    per_image = count(DiTConfig(**fields)).train
    assert c["images"] == 1e20 // per_image
    assert 0 <= 1e20 - c["images"] * per_image < per_image
    assert c["tokens"] == c["images"] * 256
    assert c["steps"] == c["images"] // 1024


def test_a_fitted_surface_plans_with_intervals() -> None:
    fit = fit_surface(study(noise=0.004))
    p = plan(fit, budget=1e21)
    n, d, loss = optimum(CHINCHILLA, 1e21)
    assert p.intervals["params"][0] < n < p.intervals["params"][1]
    assert p.intervals["loss"][0] < loss < p.intervals["loss"][1]
    assert p.extrapolation == pytest.approx(100)
    # Flat: at the edges of the band the loss is 1 % above, at the same compute.
    assert p.flatness is not None
    for side in ("smaller", "larger"):
        at = p.params * p.flatness[side]
        value = fit.predict(params=at, tokens=1e21 / 6 / at).value
        assert value == pytest.approx(1.01 * p.loss, rel=1e-6)
    assert p.flatness["smaller"] < 1 < p.flatness["larger"]
    assert p.wrong is not None and 0 <= p.wrong["low"]["wasted_compute"] < 0.5
    assert f"at the ends of the interval of N: N {p.wrong['low']['params']:.4g} gives loss" in p.summary()
    assert "FLOPs: as the runs count them" in p.summary() and "FLOPs: 6ND" in plan("liang2024", budget=1e20).summary()


def test_target_loss_is_the_inverse_of_budget() -> None:
    fit = fit_surface(study())
    loss = plan(fit, budget=3e20).loss
    assert plan(fit, target_loss=loss).budget == pytest.approx(3e20, rel=1e-6)
    assert plan("liang2024", target_loss=0.6325156480434136).budget == pytest.approx(1.5e21, rel=1e-6)
    with pytest.raises(InputError, match=r"above what the law gives at 1e\+40 FLOPs \(1.69"):
        plan(fit, target_loss=1.6)
    with pytest.raises(InputError, match="predicts no loss"):
        plan("yin2024-video", target_loss=0.5)


def test_a_deadline_is_hours_times_measured_throughput() -> None:
    p = plan("liang2024", hours=10, gpus=8, gpu="h100", mfu=0.5)
    assert p.budget == pytest.approx(10 * 3600 * 8 * 0.5 * peak_flops("h100"))
    assert p.machine is not None
    assert p.machine["gpu_hours"] == pytest.approx(80) and p.machine["hours"] == pytest.approx(10)
    assert p.machine["mfu_source"] == "given"
    assumed = plan("liang2024", budget=1e20, gpu="a100").machine
    assert assumed is not None and "assumed" in assumed["mfu_source"]
    measured = plan("liang2024", hours=1, flops_per_second=5e13)
    assert measured.budget == pytest.approx(1.8e17)
    # Whose peak is not known, of that no share is claimed.
    assert measured.machine is not None and measured.machine["mfu"] is None
    assert "on 1 x machine at 5e+13 FLOP/s each (measured throughput)" in measured.summary()


def test_inference_moves_to_a_smaller_model_trained_longer() -> None:
    fit = fit_surface(study())
    base = plan(fit, budget=1e21)
    p = plan(fit, budget=1e21, inference_images=1e9, configure=True)
    assert p.inference is not None
    assert p.inference["params"] < base.params and p.inference["data"] > base.data
    same = fit.predict(params=p.inference["params"], tokens=p.inference["data"]).value
    assert same == pytest.approx(base.loss, rel=1e-6)
    # Sardana et al., arXiv:2401.00448: at the optimum eps_N / eps_D = 1 + D_inference / (3 D_training).
    n, d = p.inference["params"], p.inference["data"]
    units = 1e9 * 50 * 256
    eps_n = CHINCHILLA["alpha"] * CHINCHILLA["A"] / n ** CHINCHILLA["alpha"]
    eps_d = CHINCHILLA["beta"] * CHINCHILLA["B"] / d ** CHINCHILLA["beta"]
    assert eps_n / eps_d == pytest.approx(1 + units / (3 * d), rel=1e-3)
    alone = plan(fit, budget=1e21, inference_images=1e9, configure=False)  # images have their tokens without a DiT, too
    assert alone.inference == p.inference
    # Neither side does better at the same loss.
    assert p.inference["saving"] > 1


def test_hyperparameters_join_the_plan() -> None:
    p = plan("yin2024-video", budget=1e21)
    assert p.lr is None  # the law gives no D, so the tokens are unknown
    q = plan("liang2024", budget=1e20, hparams="steplaw2025")
    assert q.lr == pytest.approx(1.7973 * q.params**-0.71292 * q.tokens**0.30749)
    assert q.batch_tokens == pytest.approx(0.5807 * q.tokens**0.57094)
    assert q.configuration is not None
    assert q.configuration["batch"] == round(q.batch_tokens / 256)
    with pytest.raises(InputError, match="batch or learning rate, got hoffmann2022, which holds a surface alone"):
        plan("liang2024", budget=1e20, hparams="hoffmann2022")


def test_saved_fits_and_study_folders(tmp_path: Path) -> None:
    surface, iso = fit_surface(study(noise=0.004)), fit_isoflop(study(noise=0.004))
    files = {"surface": surface.to_json(), "isoflop": iso.to_json()}
    for name, record in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "laws.json").write_text(json.dumps(files))
    direct = plan(surface, budget=1e20)
    for source in (tmp_path / "surface.json", tmp_path / "laws.json", tmp_path):
        p = plan(str(source), budget=1e20)
        assert p.params == pytest.approx(direct.params, rel=1e-12)
        assert p.intervals["loss"] == pytest.approx(direct.intervals["loss"], rel=1e-12)
    lines = plan(str(tmp_path / "isoflop.json"), budget=1e20)
    assert lines.params == pytest.approx(iso.predict(1e20)["params"].value)
    assert lines.law == "isoflop-parabola"
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="to hold a fit saved by"):
        plan(str(tmp_path / "other.json"), budget=1e20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"law": "liang2024", "budget": -3.0}, "budget: expected a positive number, got -3"),
        ({"law": "liang2024", "budget": float("nan")}, "budget: expected a positive number"),
        ({"law": "liang2024"}, "exactly one of budget, target-loss and hours, got none"),
        ({"law": "liang2024", "budget": 1e20, "hours": 3.0}, "exactly one of .*, got budget and hours"),
        ({"law": "", "budget": 1e20}, "study folder with laws.json, got ''"),
        ({"law": "liang2024", "budget": 1e20, "gpus": 8}, "gpus: expected a machine"),
        ({"law": "liang2024", "budget": 1e20, "spend": 1e18}, "spend: expected a surface fitted to runs"),
        (
            {"law": "liang2024", "budget": 1e20, "gpu": "h100", "flops_per_second": 1e16},
            "flops-per-second: expected at most 9.89.*, the peak of h100",
        ),
        (
            {"law": "liang2024", "budget": 1e20, "gpu": "h100", "mfu": 0.3, "flops_per_second": 1e14},
            "mfu: expected it or --flops-per-second, got both",
        ),
        ({"law": "nobody2020", "budget": 1e20}, "law: expected a fit's file or one of liang2024"),
        ({"law": "steplaw2025", "budget": 1e20}, "allocates no budget"),
        ({"law": "liang2024", "hours": 3.0}, "gpu: expected a machine"),
        ({"law": "liang2024", "budget": 1e20, "gpu": "abacus"}, "gpu: expected one of H100"),
        ({"law": "liang2024", "budget": 1e20, "mfu": 0.3}, "mfu: expected --gpu"),
        ({"law": "liang2024", "budget": 1e20, "gpu": "h100", "mfu": 1.3}, "mfu: expected a share"),
        (
            {"law": "liang2024", "budget": 1e20, "params_kind": "some"},
            "params-kind: expected per_token or total",
        ),
        ({"law": "liang2024", "budget": 1e20, "image_size": 100}, "image_size: expected a multiple of 16"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    law = options.pop("law")
    with pytest.raises(InputError, match=message):
        plan(law, **options)  # type: ignore[arg-type]


def test_laws_in_flops_per_token_get_no_configuration() -> None:
    p = plan("vonruette2025-masked", budget=1e20)
    assert p.configuration is None
    assert any("not a number of parameters" in w for w in p.warnings)


def test_a_law_without_data_says_why_it_gives_no_batch_and_learning_rate() -> None:
    p = plan("yin2024-video", budget=1e19, hparams="yin2024-video", configure=False)
    assert p.lr is None and any("no batch or learning rate" in w for w in p.warnings)
    assert not any("no batch" in w for w in plan("yin2024-video-surface", budget=1e19, configure=False).warnings)


def test_wider_loss_interval_further_out() -> None:
    fit = fit_surface(study(noise=0.004))
    widths = [np.log(np.divide(*reversed(plan(fit, budget=b).intervals["loss"]))) for b in (1e19, 1e20, 1e22)]
    assert widths[0] < widths[1] < widths[2]


def test_a_plan_says_what_to_run_next() -> None:
    fit = fit_surface(study(noise=0.004, shock=0.002))
    p = plan(fit, budget=1e21)
    assert p.next_runs is not None and p.next_runs.target == 1e21
    spent = sum(r["flops"] for r in p.next_runs.runs)
    made = float((6 * fit.fit.inputs["params"] * fit.fit.inputs["data"]).sum())
    assert spent <= made * (1 + 1e-6)
    assert p.next_runs.runs[-1]["se_after"] < p.next_runs.se_before
    less = plan(fit, budget=1e21, spend=1e18).next_runs
    assert less is not None and less.runs[-1]["se_after"] > p.next_runs.runs[-1]["se_after"]
    assert sum(r["flops"] for r in less.runs) <= 1e18 * (1 + 1e-6)
    assert "to narrow the interval of the loss" in p.summary()
    assert plan("liang2024", budget=1e20).next_runs is None
    with pytest.raises(InputError, match="spend: expected a positive number"):
        plan(fit, budget=1e21, spend=-1.0)


def test_the_size_of_a_plan_is_what_the_runs_counted() -> None:
    table = study(noise=0.004)
    named = RunTable.from_columns({**table.columns, "params_per_token": table.params}, params="params_per_token")
    kinds = {name: plan(fit_surface(t), budget=1e20) for name, t in (("total", table), ("per_token", named))}
    for kind, p in kinds.items():
        assert p.configuration is not None and p.configuration["params_kind"] == kind
        count = p.configuration["params" if kind == "total" else "params_per_token"]
        assert count == pytest.approx(p.params, rel=0.05)


def test_a_studys_laws_hold_no_clock_and_plan_all_the_same(tmp_path: Path) -> None:
    def without_times(value: object) -> object:
        if isinstance(value, dict):
            return {k: without_times(v) for k, v in value.items() if k != "seconds"}
        return [without_times(v) for v in value] if isinstance(value, list) else value

    fit = fit_surface(study(noise=0.004))
    (tmp_path / "laws.json").write_text(json.dumps(without_times({"surface": fit.to_json()})))
    assert plan(str(tmp_path), budget=1e20).params == pytest.approx(plan(fit, budget=1e20).params, rel=1e-12)


def test_a_studys_plan_is_of_its_own_models(tmp_path: Path) -> None:
    study_of = StudyConfig(
        name="narrow",
        budgets=(10**12, 10**13, 10**14),
        target=10**15,
        prior_coefficient=0.36,
        prior_exponent=0.47,
        head_width=8,
        depth=3,
        model={"image_size": 32, "latent_factor": 1, "in_channels": 3, "patch": 8, "condition": "none"},
        training={"batch": 24, "lr": 5e-3},
        lr_images=10_000,
        lr_exponent=0.2,
    )
    own = Study.create(tmp_path, study_of)
    table = study(noise=0.004)
    columns = {"params_per_token": table.params, "images": table.data, "flops": table.flops, "loss": table.loss}
    fit = fit_surface(RunTable.from_columns(columns, params="params_per_token"))
    (tmp_path / "laws.json").write_text(json.dumps({"surface": fit.to_json()}))
    for law in (tmp_path, tmp_path / "laws.json"):
        p = plan(law, budget=1e20)
        c = p.configuration
        assert c is not None
        # Depth, patch, pixels, channels and conditioning of the study, and its width nearest to N_opt.
        model = DiTConfig.from_dict(c["model"])
        assert model == study_of.size(model.width) and model.depth == 3 and model.patch == 8
        assert c["params_per_token"] == pytest.approx(p.params, rel=0.02)
        assert p.tokens == pytest.approx(16 * p.images)
        # What its runs trained with, where no other law of batch and rate was given.
        assert (c["batch"], p.lr, p.batch_tokens) == (24, own.config.rate(5e-3, p.images), 24 * 16)
        assert p.lr == pytest.approx(5e-3 * (p.images / 10_000) ** -0.2, rel=1e-3)
        assert c["steps"] == c["images"] // 24
    larger = plan(tmp_path, budget=1e20, image_size=64).configuration
    assert larger is not None and larger["tokens_per_image"] == 64 and larger["depth"] == 3
    deeper = plan(tmp_path, budget=1e20, aspect=32, head_width=32).configuration
    assert deeper is not None and deeper["depth"] > 10 and deeper["patch"] == 8
    other = plan(tmp_path, budget=1e20, template=DiTConfig(patch=4), batch=7)
    assert other.configuration is not None and other.configuration["patch"] == 4
    assert other.lr is None and other.configuration["batch"] == 7
    tuned = plan(tmp_path, budget=1e20, hparams="steplaw2025")
    assert tuned.lr == pytest.approx(1.7973 * tuned.params**-0.71292 * tuned.tokens**0.30749)
    assert tuned.configuration is not None and tuned.configuration["batch"] != 24
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(InputError, match="expected a study of schema 1, got a damaged one"):
        plan(tmp_path, budget=1e20)


@pytest.mark.parametrize("mfu", [0, -1.0, 1.5, float("nan"), "x"])
def test_a_machine_s_share_of_its_peak_is_checked(mfu: object) -> None:
    with pytest.raises(InputError, match="mfu"):
        machine_rate("h100", mfu, None, 1)  # type: ignore[arg-type]
