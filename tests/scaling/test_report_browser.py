"""The study's page in a real browser: no errors, no requests, and its controls do what they say."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ditscale.scaling.report import build_page, write_report
from ditscale.scaling.study_view import read_study

pytestmark = pytest.mark.browser

_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",
    "--window-size=1280,900",
)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium with a profile of its own."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chauffeur = shutil.which("chromedriver")
    if browser is None or chauffeur is None:
        pytest.skip("no chromium with chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*_FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with_driver = webdriver.Chrome(service=Service(chauffeur), options=options)
    yield with_driver
    with_driver.quit()


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with one diverged run, and its page."""
    spec = importlib.util.spec_from_file_location("page_fixture", Path(__file__).with_name("page_fixture.py"))
    assert spec is not None and spec.loader is not None
    page_fixture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page_fixture)
    copy = tmp_path_factory.mktemp("browser") / "study"
    shutil.copytree(page_fixture.shared_study(tmp_path_factory), copy)
    record = sorted(copy.glob("runs/*/run.json"))[0]
    content = json.loads(record.read_text())
    record.write_text(json.dumps({**content, "loss": None, "status": "diverged", "loss_by_timestep": None}))
    write_report(copy)
    return copy


@pytest.fixture
def page(driver: Any, study: Path) -> Any:
    """The page, freshly opened, wide and light."""
    return _open(driver, study / "report.html")


def _open(driver: Any, path: Path, *, width: int = 1280, theme: str = "light") -> Any:
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    feature = {"name": "prefers-color-scheme", "value": theme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    driver.get_log("browser")
    driver.get("about:blank")
    driver.get(path.as_uri())
    from selenium.webdriver.support.wait import WebDriverWait

    # On a busy machine a test once found none of the page's elements.
    WebDriverWait(driver, 30).until(lambda page: page.current_url == path.as_uri() and _is_loaded(page))
    return driver


def _is_loaded(page: Any) -> bool:
    return bool(
        page.execute_script("return document.readyState === 'complete' && document.querySelector('h1') !== null")
    )


def _number(text: str) -> float:
    scales = {"k": 1e3, "M": 1e6, "B": 1e9}
    return float(text[:-1]) * scales[text[-1]] if text[-1] in scales else float(text)


def _column(page: Any, name: str) -> list[str]:
    return list(
        page.execute_script(
            "const heads = [...document.querySelectorAll('#runs thead th')].map(h => h.textContent);"
            "return [...document.querySelectorAll('#runs tbody tr')]"
            ".map(row => row.cells[heads.indexOf(arguments[0])].dataset.value);",
            name,
        )
    )


def _heading(page: Any, name: str) -> Any:
    return page.find_element("xpath", f"//table[@id='runs']//th/button[text()='{name}']")


# Wide and narrow lay the page out differently; dark has its own colours.
@pytest.mark.parametrize(("width", "theme"), [(1280, "light"), (1280, "dark"), (400, "light")])
def test_opens_without_error_request_or_sideways_scrolling(driver: Any, study: Path, width: int, theme: str) -> None:
    page = _open(driver, study / "report.html", width=width, theme=theme)
    assert page.get_log("browser") == []
    assert page.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 150) == (theme == "dark")


@pytest.mark.parametrize("width", [1280, 400])
def test_figures_and_samples_are_visible(driver: Any, study: Path, width: int) -> None:
    page = _open(driver, study / "report.html", width=width)
    for name in ("law", "isoflop", "optima", "curves", "timesteps"):
        shown = [svg for svg in page.find_elements("css selector", f"#figure-{name} svg") if svg.is_displayed()]
        assert len(shown) == 1, name
        assert shown[0].size["width"] > 0.75 * width and shown[0].size["height"] > 200
    images = page.find_elements("css selector", "#samples img")
    assert len(images) >= 6
    for image in images:
        assert image.get_property("naturalWidth") > 0 and image.size["width"] > 0.6 * width
        assert image.value_of_css_property("image-rendering") == "pixelated"


@pytest.mark.parametrize("stage", ["designed", "running", "laws", "prediction"])
def test_pages_of_unfinished_studies_open_without_error(driver: Any, study: Path, tmp_path: Path, stage: str) -> None:
    # What each stage lacks: the law, the prediction, the outcome.
    missing = {"designed": 3, "running": 3, "laws": 2, "prediction": 1}[stage]
    copy = shutil.copytree(study, tmp_path / "study")
    for name in ("outcome", "prediction", "laws")[:missing]:
        (copy / f"{name}.json").unlink()
    if stage == "designed":
        shutil.rmtree(copy / "runs")
    # The figures are drawn in the tests of the file; here it is the script that must not stumble.
    (copy / "report.html").write_text(build_page(read_study(copy), {}), encoding="utf-8")
    page = _open(driver, copy / "report.html")
    assert page.get_log("browser") == []
    assert page.find_element("css selector", "h1").is_displayed()


def test_long_names_without_a_space_widen_nothing(driver: Any, study: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(study, tmp_path / "study")
    for file, fields in (
        ("study.json", {"name": "emoji_scenes_" * 8, "machine": {"gpu": "NVIDIA_" * 20}}),
        ("laws.json", {"warnings": ["x_" * 60]}),
    ):
        content = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**content, **fields}))
    (copy / "report.html").write_text(build_page(read_study(copy), {}), encoding="utf-8")
    page = _open(driver, copy / "report.html", width=360)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize(("target", "measured"), [(2e13, 0.9), (1e18, 0.2)])
def test_the_measured_point_is_labelled_inside_the_chart(
    driver: Any, study: Path, tmp_path: Path, target: float, measured: float
) -> None:
    copy = shutil.copytree(study, tmp_path / "study")
    laws = json.loads((copy / "laws.json").read_text())
    laws["loss"]["band"] = {
        "budget": [3e10, 2 * target],
        **{key: [0.5 * f, 0.2 * f] for key, f in (("value", 1.0), ("low", 0.99), ("high", 1.01))},
    }
    (copy / "laws.json").write_text(json.dumps(laws))
    outcome = json.loads((copy / "outcome.json").read_text())
    (copy / "outcome.json").write_text(json.dumps({**outcome, "budget": target, "measured_loss": measured}))
    (copy / "report.html").write_text(build_page(read_study(copy), {}), encoding="utf-8")
    page = _open(driver, copy / "report.html", width=360)
    word = page.find_element("xpath", "//*[@id='ask-chart']/*[text()='measured']").rect
    chart = page.find_element("id", "ask-chart").rect
    for start, size in (("x", "width"), ("y", "height")):
        assert chart[start] <= word[start] and word[start] + word[size] <= chart[start] + chart[size] + 1


def test_slider_moves_the_answers_along_the_saved_laws(page: Any, study: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    laws = json.loads((study / "laws.json").read_text())
    slider = page.find_element("id", "budget")

    def answers() -> list[str]:
        ids = ("budget-out", "answer-params", "answer-data", "answer-loss", "answer-time", "beyond")
        return [page.find_element("id", name).text for name in ids]

    seen = [answers()]
    for budget in (1e11, 1.5e12, 3e13):
        page.execute_script(
            "const s = document.getElementById('budget'); s.value = Math.log10(arguments[0]);"
            "s.dispatchEvent(new Event('input'));",
            budget,
        )
        now = answers()
        assert all(a != b for a, b in zip(now[:5], seen[-1][:5], strict=True))
        seen.append(now)
        for text, law in ((now[1], laws["N_opt"]), (now[2], laws["D_opt"])):
            expected = law["coefficient"] * budget ** law["exponent"]
            assert _number(text.split("\n")[0]) == pytest.approx(expected, rel=6e-3)
        band = laws["loss"]["band"]
        right = next(i for i, b in enumerate(band["budget"]) if b >= budget)
        assert band["value"][right] - 1e-4 <= float(now[3].split("\n")[0]) <= band["value"][right - 1] + 1e-4
        low, high = map(float, now[3].split("\n")[1].split(" to "))
        assert low < float(now[3].split("\n")[0]) < high
        inside = laws["fitted_range"][0] <= budget <= laws["fitted_range"][1]
        assert ("inside the fitted range" in now[5]) == inside
    assert "15× the largest fitted budget" in seen[-1][5]
    before = float(slider.get_property("value"))
    slider.send_keys(Keys.ARROW_LEFT)
    assert float(slider.get_property("value")) < before and answers() != seen[-1]


def test_budget_buttons_and_the_chart_follow(page: Any) -> None:
    def place() -> float:
        return float(page.find_element("css selector", "#ask-chart .dot").get_attribute("cx"))

    places = []
    for button in page.find_elements("css selector", "[data-budget]"):
        button.click()
        places.append(place())
        value = float(page.find_element("id", "budget").get_property("value"))
        assert value == pytest.approx(math.log10(float(button.get_attribute("data-budget"))), abs=1e-6)
    assert len(places) == 5 and places == sorted(places) and places[0] < places[-1]


def test_table_sorts_by_number_both_ways_and_says_so(page: Any) -> None:
    heading = _heading(page, "loss")
    heading.click()
    rising = _column(page, "loss")
    # The diverged run has no loss: it stays last both ways.
    assert rising[-1] == "" and len(rising) == 25
    numbers = [float(v) for v in rising[:-1]]
    assert numbers == sorted(numbers) and len(set(numbers)) > 10
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"
    heading.click()
    falling = _column(page, "loss")
    assert falling[-1] == "" and [float(v) for v in falling[:-1]] == numbers[::-1]
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    # As text, 9,872 would stand after 15,432.
    _heading(page, "images").click()
    images = [float(v) for v in _column(page, "images")]
    assert images == sorted(images)
    assert heading.find_element("xpath", "..").get_attribute("aria-sort") == "none"


def test_table_sorts_from_the_keyboard(page: Any) -> None:
    from selenium.webdriver.common.keys import Keys

    heading = _heading(page, "width")
    page.execute_script("arguments[0].focus()", heading)
    heading.send_keys(Keys.ENTER)
    widths = [float(v) for v in _column(page, "width")]
    assert widths == sorted(widths)


def test_csv_can_be_downloaded(page: Any) -> None:
    link = page.find_element("id", "csv")
    assert link.get_attribute("download") == "runs.csv"
    text = page.execute_script("return atob(arguments[0].href.split('base64,')[1])", link)
    assert text.splitlines()[0].startswith("run_id,status,") and len(text.splitlines()) == 26
