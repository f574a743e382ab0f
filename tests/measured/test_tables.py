import pandas as pd
import pytest

from measured import tables

DATA = {"model": ["`a<b`", "鲸"], "bytes": [12_345, 3], "ratio": [1.23456, 2.0], "same": [True, False]}


def test_text_and_html_show_the_same_cells():
    table = tables.show(DATA, "Bytes by model", units={"bytes": "B"}, formats={"ratio": ".2f"})
    lines = repr(table).splitlines()
    assert lines[0] == "Bytes by model"
    assert [line.split() for line in lines[1:]] == [
        ["model", "bytes", "(B)", "ratio", "same"],
        ["`a<b`", "12,345", "1.23", "yes"],
        ["鲸", "3", "2.00", "no"],
    ]
    assert lines[3].index("3") - lines[2].index("5") == -1, "a Chinese character takes two columns of a terminal"
    markup = table._repr_mimebundle_()["text/html"]
    assert "<code>a&lt;b</code>" in markup and markup.count('scope="row"') == 2 and markup.count('scope="col"') == 4
    assert 'tabindex="0"' in markup and 'role="region"' in markup and "(B)" in markup


def test_only_ordinary_spaces_are_put_together():
    assert tables.show({"of": ["a  b\n c", "1\u00a0to\u00a02"]}, "Spaces").rows == (("a b c",), ("1\u00a0to\u00a02",))


def test_a_frame_shows_its_index_only_with_a_name():
    frame = pd.DataFrame({"loss": [3.25]}, index=["ours"])
    assert "ours" not in repr(tables.show(frame, "Losses"))
    assert "ours   3.25" in repr(tables.show(frame.rename_axis("model"), "Losses"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((DATA, " "), ("caption", "phrase")),
        (({}, "x"), ("data", "at least one")),
        ((DATA, "x", {"byte": "B"}), ("byte", "bytes")),
        ((DATA, "x", None, {"rato": ".2f"}), ("rato", "ratio")),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError) as caught:
        tables.show(*arguments)
    assert all(word in str(caught.value) for word in words)
