"""How the page's figures look, and how they get from matplotlib into a file or into a page.

Every colour comes from :data:`INK` or from :func:`ramp`, each with a light and a dark value. Files on disk
are light; in a page the light values become style-sheet variables, so that the same drawing follows the
reader's theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from ditscale.scaling.numbers_text import power_of_ten, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name -> (light, dark). Blue and vermilion are told apart under every common colour blindness (Okabe and
# Ito).
INK: dict[str, tuple[str, str]] = {
    "ink": ("#1c2230", "#e8ebf1"),
    "muted": ("#5b6475", "#a3adbf"),
    "grid": ("#e3e6ec", "#2b3242"),
    "edge": ("#b9c0cc", "#49526a"),
    "card": ("#ffffff", "#171c27"),
    "law": ("#0b63a5", "#6cb8f2"),
    "measured": ("#c8480b", "#ff9257"),
    "fitted": ("#f3f5f9", "#1d2331"),
}
_RAMPS = {"budget": ("viridis", (0.54, 0.06), (0.50, 0.96)), "size": ("plasma", (0.62, 0.02), (0.44, 0.95))}
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.labelsize": 10.0,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "xtick.major.size": 4.0,
    "ytick.major.size": 4.0,
    "xtick.minor.size": 2.0,
    "ytick.minor.size": 2.0,
    "savefig.facecolor": INK["card"][0],
    "figure.facecolor": INK["card"][0],
    "axes.facecolor": "none",
    "svg.hashsalt": "ditscale",
    "path.simplify": True,
}
# Inches: across a page, and for a telephone, where the same letters must stay readable.
WIDE, NARROW = 9.6, 4.5
LIGHT = {name: pair[0] for name, pair in INK.items()}
_HALO = 2.2
# Coordinates finer than a hundredth of a point.
_DECIMALS = re.compile(r"(?<=[ \"(-])\d+\.\d{3,}")


def ramp(kind: str, count: int) -> list[tuple[str, str]]:
    """(light, dark) colours of ``count`` rising budgets or sizes; the largest stands out most."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    name, light, dark = _RAMPS[kind]
    return [
        (str(to_hex(colormaps[name](a))), str(to_hex(colormaps[name](b))))
        for a, b in zip(np.linspace(*light, max(count, 1)), np.linspace(*dark, max(count, 1)), strict=True)
    ]


def save(figure: Figure, kind: str, *, dpi: int = 200) -> bytes:
    """A figure as a light "svg" or "png" of its own, its text as paths: the same wherever it is looked at."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        # No date: the same study draws the same bytes.
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, label: str, colours: dict[str, tuple[str, str]]) -> str:
    """A figure as an ``<svg>`` for the inside of a page.

    Args:
        figure: what :func:`ditscale.scaling.figures.draw_figures` drew.
        name: prefix of every id, so that several figures can stand in one page.
        label: what a screen reader says, as escaped text.
        colours: name -> (light, dark); each light value becomes ``var(--fig-<name>)``.
    """
    import matplotlib as mpl
    from matplotlib.text import Text

    buffer = io.StringIO()
    # A rim around text would turn its letters into paths; the page's style sheet draws it instead (ids with
    # "halo").
    rims = {text: text.get_path_effects() for text in figure.findobj(Text) if text.get_path_effects()}
    for i, text in enumerate(rims):
        text.set_gid(f"halo-{i}")
        text.set_path_effects([])
    with mpl.rc_context({**_STYLE, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    for text, rim in rims.items():
        text.set_path_effects(rim)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]
    svg = svg[svg.index(">") + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"<[^>]*>", lambda tag: _DECIMALS.sub(lambda m: f"{float(m.group()):.2f}", tag.group()), svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    svg = (
        svg.replace('id="', f'id="{name}-')
        .replace('xlink:href="#', f'href="#{name}-')
        .replace("url(#", f"url(#{name}-")
    )
    variables = {light: f"var(--fig-{key})" for key, (light, _) in colours.items()}
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda m: variables.get(m.group(0), m.group(0)), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg).strip()
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 {width} {height}">{svg}'


@contextmanager
def style() -> Iterator[None]:
    import matplotlib as mpl

    ink: dict[Any, Any] = {
        "text.color": LIGHT["ink"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.edgecolor": LIGHT["edge"],
        "axes.titlecolor": LIGHT["ink"],
        "xtick.color": LIGHT["edge"],
        "ytick.color": LIGHT["edge"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "grid.color": LIGHT["grid"],
    }
    with mpl.rc_context({**_STYLE, **ink}):
        yield


def canvas(width: float, height: float, **layout: Any) -> tuple[Figure, Any]:
    # Figure without pyplot: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**layout)


# Axes


def flops_axis(ax: Axes, label: str = "training compute C (FLOPs)") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(10, numticks=12))
    ax.xaxis.set_minor_locator(LogLocator(10, subs=range(2, 10), numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: power_of_ten(v, 1)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(label)


def count_axis(ax: Axes, axis: str, label: str) -> None:
    """Logarithmic, labelled 10k 20k 50k where there is less than two decades to show."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

    which = getattr(ax, f"{axis}axis")
    getattr(ax, f"set_{axis}scale")("log")
    low, high = getattr(ax, f"get_{axis}lim")()
    subs = (1, 2, 5) if high / low < 300 else (1,)
    ticks = [s * 10.0**e for e in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for s in subs]
    which.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    which.set_minor_locator(LogLocator(10, subs=range(2, 10), numticks=12))
    which.set_major_formatter(FuncFormatter(lambda v, _: short(v, 2)))
    which.set_minor_formatter(NullFormatter())
    getattr(ax, f"set_{axis}lim")(low, high)
    getattr(ax, f"set_{axis}label")(label)


def loss_axis(ax: Axes, low: float, high: float, label: str = "validation loss") -> None:
    """Logarithmic, with round ticks at even steps of what is shown."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ratio = high / low
    if ratio > 30:
        ticks = [s * 10.0**e for e in range(-6, 6) for s in (1, 2, 5)]
    else:
        step = next(s for s in _round_steps() if (high - low) / s <= 9)
        ticks = [step * i for i in range(1, int(high / step) + 2)]
        if ratio > 2.5:
            # Even steps crowd at the top of a logarithmic axis.
            kept: list[float] = []
            for tick in ticks:
                if low <= tick <= high and (not kept or tick / kept[-1] > ratio ** (1 / 9)):
                    kept.append(tick)
            ticks = kept
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks if low <= t <= high]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.4g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_ylabel(label)


def _round_steps() -> Iterator[float]:
    for exponent in range(-6, 6):
        yield from (s * 10.0**exponent for s in (1, 2, 2.5, 5))


def halo(text: Any) -> None:
    """A rim in the colour of the ground, so that a label stays readable on lines."""
    from matplotlib import patheffects

    text.set_path_effects([patheffects.withStroke(linewidth=_HALO, foreground=LIGHT["card"])])
