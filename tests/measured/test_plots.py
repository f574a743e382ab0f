import base64
import re
import subprocess
import sys

import ipywidgets
import matplotlib
import numpy
import pytest
from matplotlib import pyplot

from dslib.roofline import Roof, Workload, place
from measured import plots

ROOF = Roof("r", bandwidth=1e12, flops={"float16": 100e12}, memory_bytes=1e9, source="test")


@pytest.fixture(autouse=True)
def style():
    with matplotlib.rc_context():
        matplotlib.use("agg")
        plots.use_style()
        yield


def draw(power=1, **_):
    fig, ax = pyplot.subplots()
    ax.plot([0, 1, 2], [x**power for x in range(3)])
    ax.set_xlabel("x (m)")
    return fig


def test_the_alternative_text_reaches_the_html():
    picture = plots.show(draw(), alt='A line from 0 to 2, "straight" & rising')
    bundle = picture._repr_mimebundle_()
    assert 'alt="A line from 0 to 2, &quot;straight&quot; &amp; rising"' in bundle["text/html"]
    assert bundle["text/plain"].startswith("Figure: A line")
    png = base64.b64decode(re.search(r"base64,([^\"]+)", bundle["text/html"]).group(1))
    assert png.startswith(b"\x89PNG") and len(png) <= plots.LARGEST


def test_figures_are_closed_and_drawn_alike_whatever_the_reader_has_set():
    first = plots.show(draw(), alt="a")
    assert not pyplot.get_fignums()
    theirs = {"text.usetex": True, "lines.linewidth": 9, "savefig.bbox": "tight", "axes.facecolor": "red"}
    matplotlib.rcParams.update(theirs | {"font.size": 20, "xtick.direction": "in"})
    plots.use_style()
    assert plots.show(draw(), alt="a").data == first.data
    assert matplotlib.get_backend() == "agg"


def test_a_busy_picture_is_made_smaller():
    fig, ax = pyplot.subplots()
    ax.imshow(numpy.random.default_rng(0).random((600, 600)), interpolation="nearest")
    busy = plots.show(fig, alt="noise")
    plain = plots.show(draw(), alt="line")
    # Width in the PNG header: fewer dots for the busy one.
    assert busy.data[16:20] < plain.data[16:20]


def test_a_roof_bends_at_its_ridge_and_work_lies_on_it():
    fig, ax = pyplot.subplots()
    plots.draw_roofs(ax, [ROOF], "float16", low=1, high=1000)
    plots.draw_places(ax, [place(Workload("w", 1e9, work, "float16"), ROOF) for work in (10e9, 500e9)])
    line, below, above = ax.get_lines()
    assert list(line.get_xdata()) == [1, 100, 1000]
    assert list(line.get_ydata()) == [1, 100, 100]
    assert (below.get_xdata()[0], below.get_ydata()[0]) == (10, 10)
    assert (above.get_xdata()[0], above.get_ydata()[0]) == (500, 100)
    pyplot.close(fig)


def _contrast(a, b):
    """Contrast ratio as WCAG 2 defines it."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_colour_is_legible_on_the_paper():
    assert _contrast(plots.INK, plots.PAPER) >= 7
    for colour in plots.COLOURS:
        assert _contrast(colour, plots.PAPER) >= 3, colour
    assert len(plots.COLOURS) == len(plots.LINES) == len(plots.MARKERS)


def test_explorer_shows_its_default_without_a_kernel_and_without_ipywidgets(monkeypatch):
    explorer = plots.explore(draw, lambda power, grid: f"Power {power}", power=[2, 3], grid=True)
    assert explorer.defaults == {"power": 2, "grid": True}
    bundle = explorer._repr_mimebundle_()
    assert 'alt="Power 2"' in bundle["text/html"]
    assert bundle["text/plain"].splitlines() == [
        "Explorer of 4 states.",
        "power=2, grid=yes: Power 2",
        "power=3, grid=yes: Power 3",
        "power=3, grid=no: Power 3",
    ]
    assert repr(explorer.draw(power=3)) == "Figure: Power 3"
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(explorer._repr_mimebundle_()) == {"text/html", "text/plain"}


def test_explorer_redraws_when_a_control_moves():
    ready = ipywidgets.IntText(value=5, description="n")
    explorer = plots.explore(
        lambda **values: draw(values["power"]),
        lambda **values: f"{values}",
        power=(1, 4),
        kind={"one": 1, "two": 2},
        flag=False,
        n=ready,
    )
    box = explorer.live()
    *controls, view = box.children
    before = view.value
    controls[0].value = 3
    assert view.value != before and "power" in view.value
    assert "application/vnd.jupyter.widget-view+json" in explorer._repr_mimebundle_()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.show(draw(), ""), "alt: got ''"),
        (lambda: plots.show(draw(), "  \n"), "alt: got '  "),
        (lambda: plots.show(draw(), None), "alt: got None"),
        (lambda: plots.show([1], "x"), "fig: got list"),
        (lambda: plots.explore(draw, "x"), "widgets: got none"),
        (lambda: plots.explore(draw, "x", x="abc"), "x: got 'abc'"),
        (lambda: plots.explore(draw, "x", x=[]), r"x: got \[\]"),
        (lambda: plots.explore(draw, "x", x=(1, 2, 3)), r"x: got \(1, 2, 3\)"),
        (lambda: plots.explore(draw, "x", x=(3, 1)), r"x: got \(3, 1\)"),
        (lambda: plots.explore(draw, "x", x=(0.5, float("nan"))), r"x: got \(0.5, nan\)"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", low=0), "low: got 0, expected a number above 0"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", low=float("nan")), "low: got nan"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", low=8, high=8), "high: got 8, expected a number above 8"),
        (lambda: plots.draw_roofs(None, [ROOF], "float16", high=float("inf")), "high: got inf"),
        (lambda: plots.explore(draw, "x", power=[1]).draw(speed=2), "speed: not a control"),
        (lambda: plots.explore(3, "x", power=[1]), "draw: got 3"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_it_loads_no_matplotlib():
    code = "import sys, measured.plots; assert not {'matplotlib', 'torch', 'ipywidgets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
