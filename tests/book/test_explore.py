"""The explorers of a built page, in a real browser: `_static/explore.js` with what `plots.explore` stores.

Skipped where no Chromium is installed. The page lies in a folder and is opened from file://.
"""

import json
import shutil
import subprocess

import matplotlib
import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot

from measured import plots
from tools import book

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# Runs when the controls are there, and reports what a reader has before them.
DRIVE = """<script>
const wait = setInterval(() => {
  if (!document.querySelector(".explorer-controls")) return;
  clearInterval(wait);
  const [first, second] = document.querySelectorAll("figure.explorer");
  const put = (selector, values) => {
    const input = (second ?? first).querySelector(selector);
    Object.assign(input, values).dispatchEvent(new Event("input", { bubbles: true }));
  };
  const report = { errors: window.errors };
  try { localStorage.length; report.storage = "open"; } catch { report.storage = "blocked"; }
  %s
  report.alt = [...document.querySelectorAll("figure.explorer img")].map((image) => image.alt);
  report.src = [...document.querySelectorAll("figure.explorer img")].map((image) => image.src.slice(0, 60));
  report.drawn = [...document.querySelectorAll("figure.explorer img")].map((image) => image.naturalWidth > 0);
  report.said = document.querySelector("figure.explorer output").value;
  report.hash = location.hash;
  const pre = Object.assign(document.createElement("pre"), { id: "report", textContent: JSON.stringify(report) });
  document.body.append(pre);
}, 10);
</script>"""
ERRORS = """<script>
window.errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("unhandledrejection", (event) => errors.push(String(event.reason)));
console.warn = (reason) => errors.push(String(reason));
</script>"""


def draw(power, dashed, shift):
    fig, ax = pyplot.subplots(figsize=(3, 2))
    ax.plot([0, 1, 2], [x**power + shift for x in range(3)], "--" if dashed else "-")
    return fig


def words(power, dashed, shift):
    return f"Power {power}, {'dashed' if dashed else 'solid'}, shift {shift} </script> & “so”"


@pytest.fixture(scope="module")
def explorer():
    with matplotlib.rc_context():
        matplotlib.use("agg")
        plots.use_style()
        return plots.explore(draw, words, power={"one": 1, "two & more": 2}, dashed=False, shift=(0, 8))


@pytest.fixture
def visit(tmp_path, explorer):
    """Opens a page with ``count`` explorers; returns its DOM as the browser has it in the end."""

    def visit(act="", address="", count=1, before="", preferences=None):
        folder = tmp_path / "a page 鲸"
        (folder / "_static").mkdir(parents=True)
        shutil.copy(book.ROOT / "_static" / "explore.js", folder / "_static")
        script = '<script src="_static/explore.js"></script>'
        figures = explorer._repr_mimebundle_()["text/html"] * count
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>{ERRORS}{before}{script}'
        (folder / "page.html").write_text(head + figures + (DRIVE % act), encoding="utf-8")
        profile = tmp_path / "profile"
        (profile / "Default").mkdir(parents=True)
        (profile / "Default" / "Preferences").write_text(json.dumps(preferences or {}))
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
        url = (folder / "page.html").as_uri() + address
        command = [CHROMIUM, *flags, f"--user-data-dir={profile}", url]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=60, encoding="utf-8").stdout
        return BeautifulSoup(dom, "html.parser")

    return visit


def _blocked(what):
    """A browser's settings as a person makes them: nothing of the kind ``what`` is allowed anywhere."""
    return {"profile": {"default_content_setting_values": {what: 2}}}


def report(soup):
    return json.loads(soup.find(id="report").string)


def test_controls_step_through_the_states(visit):
    soup = visit(
        'put("select", {value: 1}); put("input[type=range]", {value: 4}); put("input[type=checkbox]", {checked: true});'
    )
    told = report(soup)
    assert told["alt"] == [words(2, True, 8)] and told["drawn"] == [True] and told["errors"] == []
    assert told["said"] == f"power two & more, dashed yes, shift 8. {words(2, True, 8)}"
    assert told["hash"] == "#explore-1:power=two+%26+more&dashed=yes&shift=8"
    labels = [label.get_text(" ", strip=True) for label in soup.select(".explorer-controls label")]
    assert labels == ["power one two & more", "dashed", "shift 8"]
    assert soup.select_one("input[type=range]")["aria-valuetext"] == "8"
    assert not soup.select(".explorer-state"), "the controls say what is shown"


@pytest.mark.parametrize(
    ("situation", "wanted"),
    [
        ({"address": "#explore-1:power=two+%26+more&shift=4"}, words(2, False, 4)),
        ({"address": "#explore-1:shift=5"}, words(1, False, 0)),  # not a stored step
        ({"address": "#explore-1:speed=2"}, words(1, False, 0)),  # not a control; the rest is at its default
        ({"address": "#explore-1:power=%E0%A4%A"}, words(1, False, 0)),  # not UTF-8
        ({"address": "#explore-7:shift=4"}, words(1, False, 0)),
        ({"address": "#%"}, words(1, False, 0)),
    ],
)
def test_a_state_in_the_address(visit, situation, wanted):
    told = report(visit(**situation))
    assert told["alt"] == [wanted] and told["errors"] == [] and told["drawn"] == [True]
    assert told["hash"] == situation["address"], "what was not understood stays as it was"


def test_two_explorers_do_not_meet(visit):
    told = report(visit('put("select", {value: 1});', count=2, address="#explore-2:shift=2"))
    assert told["alt"] == [words(1, False, 0), words(2, False, 2)] and told["errors"] == []


def test_without_scripts_the_first_state_stands(visit):
    soup = visit(preferences=_blocked("javascript"))
    assert soup.find(id="report") is None
    image = soup.select_one("figure.explorer img")
    assert image["alt"] == words(1, False, 0) and image["src"].startswith("data:image/svg+xml;base64,")
    assert soup.select_one(".explorer-state").string == "power one, dashed no, shift 0"
    assert not soup.select("figure.explorer :is(select, input, button)"), "a control that does nothing"


def test_where_storage_is_blocked(visit):
    told = report(visit('put("select", {value: 1});', preferences=_blocked("cookies")))
    assert told["storage"] == "blocked" and told["errors"] == []
    assert told["alt"] == [words(2, False, 0)]


def test_a_browser_that_cannot_unpack_keeps_the_first_state(visit):
    soup = visit(before="<script>delete window.DecompressionStream;</script>")
    assert soup.select_one("figure.explorer img")["alt"] == words(1, False, 0)
    assert soup.select_one(".explorer-state") and not soup.select(".explorer-controls")
