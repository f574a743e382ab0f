"""The block under a title, copies for a class, and the shares of a built page."""

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools import draw_curve, draw_front, heights, model_card, notebooks, opening, plans

RUN = (12, 1.5, 2, "2026-01-31")


def page(words=1000):
    out = [new_output("stream", text="1\n")]
    return new_notebook(
        cells=[
            new_markdown_cell("# T\n\nA question?", id="title"),
            new_markdown_cell("## One\n\n" + "word " * words, id="one"),
            new_code_cell("x = 1\n" * 10, id="code", outputs=out),
            new_code_cell("import os\n" * 10, id="folded", metadata={"tags": ["hide-input"]}),
            new_markdown_cell("## Exercises", id="two"),
            new_code_cell("def f(): ...", id="stub", metadata={"tags": ["exercise"]}),
            new_code_cell("def f(): return 1", id="answer", metadata={"tags": ["solution", "hide-cell"]}),
        ]
    )


def test_minutes_count_words_open_code_outputs_and_exercises():
    reading, exercises = opening.minutes(page().cells)
    assert reading == pytest.approx(1004 / 200 + 10 / 12 + 1 / 3, abs=0.05) and exercises == 5
    assert [heading for heading, _ in opening.sections(page())] == ["", "One", "Exercises"]
    assert sum(minutes for _, minutes in opening.sections(page())) == pytest.approx(reading + exercises)


def test_the_block_says_what_pages_yml_says_and_stays_when_written_twice(monkeypatch):
    entry = {"able": ["write a cache"], "needs": ["architecture/decoder", "shapes"]}
    monkeypatch.setattr(opening, "pages", lambda: {"performance/speed": entry})
    notebook = page()
    opening.fill(notebook, RUN, "performance/speed")
    once = notebook.cells[0].source
    number = opening.numbers()["performance/speed"]
    assert f"*Chapter {number}. About 5 minutes, exercises 5 more. Runs in 12 s with 1.5 GiB on a 2-core CPU." in once
    assert "- write a cache" in once and "](../architecture/decoder.ipynb); shapes." in once
    assert opening.run_of(notebook) == RUN
    opening.fill(notebook, RUN, "performance/speed")
    assert notebook.cells[0].source == once
    entry["needs"] = ["architecture/nowhere"]
    with pytest.raises(ValueError, match="architecture/nowhere"):
        opening.fill(notebook, RUN, "performance/speed")


def test_entries_name_pages_that_exist_and_numbers_follow_the_contents():
    names = {notebooks.CHAPTERS.joinpath(f"{name}.ipynb").is_file() for name in opening.pages()}
    assert names == {True}
    assert all(entry["able"] and isinstance(entry["needs"], list) for entry in opening.pages().values())
    assert list(opening.numbers().values()) == list(range(1, len(opening.numbers()) + 1))


def test_a_copy_for_a_class_has_stubs_and_no_solutions(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "CHAPTERS", tmp_path / "chapters")
    path = tmp_path / "chapters" / "part" / "c.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(page(), str(path))
    notebooks.write_student([path], tmp_path / "student")
    copy = notebooks.read(tmp_path / "student" / "part" / "c.ipynb")
    assert "answer" not in [cell.id for cell in copy.cells] and "stub" in [cell.id for cell in copy.cells]
    assert "answer" in [cell.id for cell in notebooks.read(path).cells]


def test_shares_of_a_page_are_those_a_browser_lays_out(tmp_path):
    program = heights.browser()
    if program is None:
        pytest.skip("no Chromium here")
    style = "<style>*{margin:0;padding:0;line-height:0;font-size:0} div,img{display:block;width:9px}</style>"
    open_code, folded = "<div class='cell_input' style='height:{}px'></div>", "<details>{}</details>"
    body = open_code.format(300) + folded.format(open_code.format(999)) + "<img alt='x' style='height:100px'>"
    (tmp_path / "p.html").write_text(f"<!doctype html><body>{style}<article>{body}</article></body>")
    found = heights.heights("p", program, tmp_path)
    assert (found["code"], found["pictures"], found["print"]) == (300, 100, 0) and found["all"] == 400
    assert [file.name for file in tmp_path.iterdir()] == ["p.html"]
    assert heights.line("p", found).endswith("400 px high; open code above 40%")


def test_front_page_and_plans_are_up_to_date():
    assert [path.name for path, text in plans.written().items() if path.read_text(encoding="utf-8") != text] == []
    assert draw_front.PATH.read_text(encoding="utf-8") == draw_front.draw()


def test_plans_keep_their_time():
    assert plans.plan("short")[1] <= 90 and 200 <= plans.plan("day")[1] <= 360


def test_a_plan_that_names_no_section_and_a_page_without_markers_are_refused(monkeypatch):
    monkeypatch.setattr(opening, "settings", lambda: {"plans": {"x": {"start/your_machine": ["No such section"]}}})
    with pytest.raises(ValueError, match="No such section"):
        plans.plan("x")
    with pytest.raises(ValueError, match="parts:begin"):
        opening.between("no markers", "parts", "text")


def test_the_curve_and_the_model_card_are_up_to_date():
    assert draw_curve.PATH.read_text(encoding="utf-8") == draw_curve.draw()
    assert (model_card.FOLDER / "README.md").read_text(encoding="utf-8") == model_card.card()
