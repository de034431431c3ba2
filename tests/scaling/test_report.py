"""The study's page as a file: what it says, what it refuses, and that it needs nothing from outside."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ditscale.errors import InputError
from ditscale.scaling import outlook, study_view
from ditscale.scaling.figure_style import INK, ramp
from ditscale.scaling.figures import draw_figures
from ditscale.scaling.jsonable import dumps
from ditscale.scaling.power import fit_power
from ditscale.scaling.report import build_page, write_report
from ditscale.scaling.study_view import read_study


def _fixture_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("page_fixture", Path(__file__).with_name("page_fixture.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


page_fixture = _fixture_module()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study that no test may change."""
    return Path(page_fixture.shared_study(tmp_path_factory))


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished, tmp_path / "study"))


@pytest.fixture(scope="module")
def written(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished study's page as a file, elsewhere, with its figures beside it."""
    return write_report(finished, tmp_path_factory.mktemp("page") / "elsewhere" / "page.html")


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    """The finished study's page."""
    return written.read_text(encoding="utf-8")


class _Reader(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.raw: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.raw[self._inside].append(data) if self._inside in self.raw else self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def _change(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **fields}))


def _page(study: Path) -> str:
    """The page around its figures, which take the time and are drawn where a test is about them."""
    return build_page(read_study(study), dict.fromkeys(("law", "isoflop", "curves"), ("", "")))


def _text(study: Path) -> str:
    return _Reader(_page(study)).text


# Self-contained


def test_no_resource_comes_from_outside(page: str) -> None:
    reader = _Reader(page)
    for tag, attributes in reader.tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value[:60]}>"
    code = "".join(reader.raw["style"] + reader.raw["script"])
    assert not re.search(r"https?:|@import|url\((?!['\"]?(#|data:))|fetch\(|XMLHttpRequest|import\(", code)


def test_every_reference_inside_the_page_resolves_and_ids_are_unique(page: str) -> None:
    reader = _Reader(page)
    ids = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"url\(#([^)]+)\)", page))
    for _, attributes in reader.tags:
        if attributes.get("href", "").startswith("#"):
            wanted.add(attributes["href"][1:])
        wanted |= {attributes["for"]} if "for" in attributes else set()
    assert len(wanted) > 20
    assert wanted <= set(ids)


def test_the_room_needs_no_torch_and_loads_matplotlib_late() -> None:
    code = (
        "import sys, ditscale.scaling.report\n"
        "print(sorted({'torch', 'triton', 'matplotlib', 'pandas'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_same_study_gives_the_same_bytes(finished: Path, written: Path, tmp_path: Path) -> None:
    assert write_report(finished, tmp_path / "again.html").read_bytes() == written.read_bytes()
    for path in (written.parent / "figures").iterdir():
        assert (tmp_path / "figures" / path.name).read_bytes() == path.read_bytes()


def test_a_page_lies_in_its_study_unless_it_is_told_where(finished: Path, tmp_path: Path) -> None:
    study = page_fixture.rewind(finished, tmp_path / "designed", "designed")  # nothing to draw
    assert write_report(study) == study / "report.html"
    assert (study / "report.html").is_file()


def test_markup_in_names_and_captions_stays_text(study: Path) -> None:
    _change(study / "study.json", name="<script>alert(1)</script> {{js}}")
    laws = json.loads((study / "laws.json").read_text())
    unbanded = {key: value for key, value in laws["D_opt"].items() if key != "band"}
    _change(
        study / "laws.json",
        warnings=["</script><b>loud</b>"],
        weights={"<script>alert(2)</script>": 1.0},
        data_unit="<script>alert(3)</script>",
        D_opt=unbanded,
    )
    for path in study.glob("runs/*/samples.json"):
        _change(path, captions=['"><img src=x onerror=alert(1)>'] * 8)
    page = _page(study)
    assert "<script>alert" not in page and "<b>loud" not in page and "<img src=x" not in page
    assert "<script>alert(1)</script> {{js}}" in _Reader(page).text


# What it says


def test_headline_gives_prediction_outcome_and_the_order_of_events(finished: Path, page: str) -> None:
    outcome = json.loads((finished / "outcome.json").read_text())
    prediction = json.loads((finished / "prediction.json").read_text())
    text = _Reader(page).text
    assert f"Predicted {outcome['predicted_loss']:.4f} before training." in text
    assert "and only then put to the test" in text and "written before its run began" in text
    assert f"Measured {outcome['measured_loss']:.4f} ." in text
    assert f"{100 * outcome['relative_error']:+.2f} %".replace("-", "−") in text
    assert "inside its 95 % interval" in text
    assert prediction["law_sha256"][:16] in text and "laws.json still has it" in text
    assert "1 s after the prediction" in text
    assert "10× the largest fitted budget" in text.replace("extrapolation ", "")
    assert "12.4 min" in text


def test_a_thousandfold_extrapolation_is_written_out(study: Path) -> None:
    _change(study / "outcome.json", extrapolation_factor=1001.3)
    assert "It was carried to 1,000 times the largest fitted budget" in _text(study) and "e+03" not in _text(study)
    (study / "outcome.json").unlink()
    _change(study / "prediction.json", extrapolation_factor=25000.0)
    assert "25,000×" in _text(study)


def test_claims_are_worked_out_from_the_numbers(study: Path) -> None:
    # The file claims a hit; its own numbers say otherwise.
    outcome = json.loads((study / "outcome.json").read_text())
    high = outcome["interval_95"][1]
    _change(study / "outcome.json", measured_loss=1.05 * high, inside_interval=True, relative_error=0.0)
    text = _text(study)
    assert "outside its 95 % interval" in text and "inside its 95 % interval" not in text
    assert f"{100 * (1.05 * high / outcome['predicted_loss'] - 1):.2f} % above the prediction" in text


def test_a_law_changed_after_the_prediction_is_told(study: Path) -> None:
    _change(study / "laws.json", note="touched")
    text = _text(study)
    assert "laws.json in this folder is another" in text and "laws.json still has it" not in text


def test_a_run_started_before_its_prediction_is_told(study: Path) -> None:
    _change(study / "prediction.json", made_at="2031-01-01T00:00:00Z")
    text = _text(study)
    assert "before the prediction was written" in text
    # And nothing above it claims the other order.
    assert not any(claim in text for claim in ("before training", "only then", "written before its run began"))


# Each stage of a study with what its page must and must not say.
@pytest.mark.parametrize(
    ("stage", "there", "absent"),
    [
        (
            "designed",
            ["0 of 24 runs are finished", "to come when the grid is trained"],
            ["Ask the law", "download CSV"],
        ),
        ("running", ["8 of 24 runs are finished", "How the runs learned"], ["Ask the law", "Predicted"]),
        (
            "laws",
            ["The law is fitted", "Ask the law", "to come when the law is fitted"],
            ["Measured 0", "open circle"],
        ),
        ("prediction", ["the measured loss is still to come", "is training"], ["Measured 0", "the star is"]),
        ("outcome", ["Measured 0", "the star is what that run measured"], ["still to come"]),
    ],
)
def test_a_page_at_every_stage(finished: Path, tmp_path: Path, stage: str, there: list[str], absent: list[str]) -> None:
    text = _text(page_fixture.rewind(finished, tmp_path / stage, stage))
    assert [words for words in there if words not in text] == []
    assert [words for words in absent if words in text] == []
    assert "ditscale study run" in text and "FLOP convention" in text


def test_sources_name_data_licence_versions_and_seed(page: str) -> None:
    text = _Reader(page).text
    for words in (
        "Apache-2.0",
        "5a5a5a5a",
        "torch",
        "matmul",
        "multiply-add is two",
        "seed 0",
        "held-out images",
    ):
        assert words in text, words


# Tables and data


def test_table_and_csv_hold_every_run(finished: Path, page: str) -> None:
    records = {r["run_id"]: r for r in (json.loads(p.read_text()) for p in finished.glob("runs/*/run.json"))}
    reader = _Reader(page)
    assert all(run_id in reader.text for run_id in records)
    link = next(a["href"] for _, a in reader.tags if a.get("id") == "csv")
    text = base64.b64decode(link.split("base64,", 1)[1]).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["run_id"] for row in rows} == set(records)
    for row in rows:
        assert float(row["loss"]) == records[row["run_id"]]["loss"]
        assert int(row["flops"]) == records[row["run_id"]]["flops"]


def test_slider_computes_with_the_saved_laws(finished: Path, page: str) -> None:
    laws = json.loads((finished / "laws.json").read_text())
    inside = json.loads(re.search(r'id="laws">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    for key, name in (("params", "N_opt"), ("data", "D_opt"), ("loss", "loss")):
        assert inside[key]["coefficient"] == laws[name]["coefficient"]
        assert inside[key]["exponent"] == laws[name]["exponent"]
    assert inside["band"]["low"] == pytest.approx(laws["loss"]["band"]["low"], rel=1e-7)
    assert inside["fitted"] == laws["fitted_range"]


def test_samples_are_embedded_smallest_first_and_a_damaged_one_is_told(study: Path) -> None:
    sheets = sorted(study.glob("runs/*/samples.png"))
    sheets[0].write_bytes(sheets[0].read_bytes()[:200])
    page = _page(study)
    assert page.count("data:image/png;base64,") == len(sheets) - 1
    assert f"runs/{sheets[0].parent.name}/samples.png: expected a PNG image" in _Reader(page).text
    shown = re.findall(r'class="sheet"><figcaption><b>([\d.]+)k', page)
    assert [float(v) for v in shown] == sorted(float(v) for v in shown) and len(shown) == len(sheets) - 1


def test_a_diverged_run_is_listed_and_left_out_of_the_figures(study: Path) -> None:
    path = sorted(study.glob("runs/*/run.json"))[0]
    _change(path, loss=None, status="diverged", loss_by_timestep=None)
    text = _text(study)
    assert "24 finished runs; 1 diverged" in text


def test_a_grid_that_is_trained_without_a_loss_is_not_still_training(study: Path) -> None:
    for name in ("laws.json", "prediction.json", "outcome.json"):
        (study / name).unlink()
    for path in study.glob("runs/*/run.json"):
        _change(path, loss=None, status="diverged", loss_by_timestep=None)
    text = _text(study)
    assert "0 of 24 runs gave a loss" in text and "still training" not in text


def test_a_curve_without_a_minimum_shows_no_best_size(study: Path) -> None:
    laws = json.loads((study / "laws.json").read_text())
    curves = laws["isoflop"]["optima"]
    curves[0]["bracketed"] = False
    (study / "laws.json").write_text(json.dumps(laws))
    (ax,) = draw_figures(read_study(study))["isoflop"].axes
    assert len([line for line in ax.lines if line.get_marker() == "D"]) == len(curves) - 1
    (arrow,) = [text for text in ax.texts if text.get_text().startswith("best size")]
    assert arrow.xy[0] == pytest.approx(curves[1]["params"])


def test_a_diverged_predicted_run_is_not_still_to_come(study: Path) -> None:
    (study / "outcome.json").unlink()
    run_id = json.loads((study / "prediction.json").read_text())["run_id"]
    _change(study / "runs" / run_id / "run.json", loss=None, status="diverged", loss_by_timestep=None)
    text = _text(study)
    assert "The run that tests it diverged" in text and "its loss diverged" in text
    assert "to come" not in text and "is training" not in text


def test_half_a_line_at_the_end_of_a_log_is_normal_and_damage_elsewhere_is_told(study: Path) -> None:
    first, second = sorted(study.glob("runs/*/metrics.jsonl"))[:2]
    first.write_text(first.read_text() + '{"step": 9, "imag')
    lines = second.read_text().splitlines()
    second.write_text("\n".join([*lines[:3], "garbage", *lines[3:]]) + "\n")
    text = _text(study)
    assert f"runs/{second.parent.name}/metrics.jsonl: 1 damaged lines" in text
    assert f"runs/{first.parent.name}/metrics.jsonl" not in text


def test_a_law_of_too_few_budgets_claims_no_held_out_ones(study: Path) -> None:
    laws = json.loads((study / "laws.json").read_text())
    rule = "surface: 3 budgets: too few to hold one out; the surface, untested"
    (study / "laws.json").write_text(
        json.dumps({**laws, "chosen": rule, "weights": {"surface": 1.0}, "backtest": None})
    )
    text = _text(study)
    assert rule in text and "weighted by held-out budgets" not in text


def test_laws_with_missing_parts_still_make_a_page(study: Path) -> None:
    # What a law file of another writer may lack: bands, curves, the backtest.
    laws = json.loads((study / "laws.json").read_text())
    loss = {"coefficient": laws["loss"]["coefficient"], "exponent": laws["loss"]["exponent"]}
    (study / "laws.json").write_text(json.dumps({"loss": loss}))
    text = _text(study)
    assert "There is no interval of the loss." in text and "Ask the law" in text


def test_laws_through_as_many_points_as_parameters_have_no_intervals(study: Path) -> None:
    # Two budgets with a minimum are enough for a law and for no interval of it: its ends are null, its band is empty.
    laws = json.loads((study / "laws.json").read_text())
    for name in ("N_opt", "D_opt"):
        laws[name]["intervals"] = {"coefficient": [0.0, None], "exponent": [None, None]}
        laws[name]["band"] = {key: [] for key in laws[name]["band"]}
    (study / "laws.json").write_text(json.dumps(laws))
    text = _text(study)
    assert "There is no interval of the size or the images." in text
    assert text.count("not given") == 2


def test_a_law_through_two_points_is_written_and_read_without_intervals() -> None:
    law = fit_power([1e9, 1e10], [1e4, 3e4])
    view = study_view._law(json.loads(dumps(outlook._law(law, np.geomspace(1e9, 1e11, 8)))))
    assert view is not None and view.band is None and "exponent" not in view.intervals


# Figures


def test_figures_are_written_as_files_of_their_own(written: Path) -> None:
    folder = written.parent / "figures"
    drawn = {path.name for path in folder.iterdir()}
    assert drawn == {"law.svg", "law.png", "isoflop.svg", "optima.svg", "curves.svg", "timesteps.svg"}
    for path in folder.glob("*.svg"):
        root = xml.etree.ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg") and "var(" not in path.read_text()
    assert (folder / "law.png").read_bytes().startswith(b"\x89PNG")


# What can be drawn grows with the study; a half-finished one must not stumble over what is not there.
@pytest.mark.parametrize(
    ("stage", "names"),
    [
        ("designed", set()),
        ("running", {"isoflop", "curves", "timesteps"}),
        ("laws", {"law", "isoflop", "optima", "curves", "timesteps"}),
        ("prediction", {"law", "isoflop", "optima", "curves", "timesteps"}),
    ],
)
def test_figures_at_every_stage(finished: Path, tmp_path: Path, stage: str, names: set[str]) -> None:
    view = read_study(page_fixture.rewind(finished, tmp_path / stage, stage))
    assert set(draw_figures(view)) == names
    assert set(draw_figures(view, narrow=True)) == names


@pytest.mark.parametrize("narrow", [False, True])
def test_the_name_of_a_law_near_the_axis_stands_above_it(study: Path, narrow: bool) -> None:
    # One far run stretches the axis, or a law flattens far beyond its budgets: no room is left below its band.
    path = sorted(study.glob("runs/*/run.json"))[0]
    _change(path, loss=40.0)
    figure = draw_figures(read_study(study), narrow=narrow)["law"]
    ax = figure.axes[0]
    (name,) = [text for text in ax.texts if text.get_text().startswith("the law")]
    assert name.get_window_extent().y0 > ax.get_window_extent().y0


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_figures_can_be_read_on_either_ground(theme: int) -> None:
    # WCAG 2: 4.5 for text, 3 for what is drawn.
    ground = INK["card"][theme]
    for name in ("ink", "muted", "law", "measured"):
        assert _contrast(INK[name][theme], ground) >= 4.5, name
    for kind in ("budget", "size"):
        for pair in ramp(kind, 12):
            assert _contrast(pair[theme], ground) >= 3.0, (kind, pair[theme])


# Refusals


def _refused(study: Path, out: Path | None = None) -> str:
    with pytest.raises(InputError) as caught:
        write_report(study, out)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_without_a_study_is_refused(tmp_path: Path) -> None:
    assert str(tmp_path) in _refused(tmp_path)
    assert _refused(tmp_path / "nowhere").startswith(str(tmp_path / "nowhere"))


def test_corrupt_records_are_all_named_and_the_old_page_stays(study: Path) -> None:
    page = study / "report.html"
    page.write_text("the page of yesterday")
    first, second = sorted(study.glob("runs/*/run.json"))[:2]
    first.write_text(first.read_text()[:80])
    _change(second, flops=-1)
    message = _refused(study)
    assert str(first) in message and str(second) in message
    assert "positive number of flops, got -1" in message
    assert page.read_text() == "the page of yesterday"


# Damage that a crash or an editor leaves, and what the message must name.
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("laws.json", '{"loss": {"exponent": ', "JSON"),
        pytest.param("laws.json", "[" * 100_000, "JSON", id="nested too deep"),
        ("laws.json", '{"loss": {"exponent": -0.1}}', "coefficient"),
        ("laws.json", '{"N_opt": [1, 2]}', "laws"),
        ("prediction.json", '{"loss": NaN, "budget": 1e13, "interval_95": [0.1, 0.2]}', "loss"),
        ("prediction.json", '{"loss": 0.15, "budget": 1e13, "interval_95": [0.2, 0.1]}', "interval_95"),
        ("outcome.json", '{"predicted_loss": 0.2, "interval_95": [0.1, 0.3]}', "measured_loss"),
        ("study.json", "[]", "object"),
    ],
)
def test_damaged_files_are_named(study: Path, name: str, content: str, words: str) -> None:
    (study / name).write_text(content)
    message = _refused(study)
    assert str(study / name) in message and words in message


def test_places_that_cannot_be_written_are_refused(finished: Path, tmp_path: Path) -> None:
    assert str(tmp_path) in _refused(finished, tmp_path)
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in _refused(finished, tmp_path / "file" / "report.html")
