"""What was recorded of this part is there, belongs to the functions as they are, and says what the chapter says."""

import pytest

from measured import record, recordings


def result(part, number=0):
    name, call = record.PARTS[part][number]
    shown = recordings.recorded(record.find(name), **call)
    assert shown.origin == "recorded", f"{part}: make record PART={part}"
    return shown.result


def test_tiles_keep_letters_that_a_small_square_loses():
    points = {(one["strategy"], one["height"]): one for one in result("ocr")["points"]}
    assert points["tiles of 384", 12]["low"] > 0.9
    assert points["shorter side 224", 20]["high"] < 0.6 and points["shorter side 224", 16]["high"] < 0.1
    assert points["letterbox 224", 28]["high"] < 0.1
    assert all(points["as it is", height]["mean"] > 0.98 for height in (12, 16, 20, 28, 40))
    assert all(one["characters"] > 1000 for one in points.values())


def test_two_maps_find_most_pictures_among_ten():
    found = result("retrieval")
    first, last = found["steps"][0], found["steps"][-1]
    assert found["searches"] == 1800 and found["pool"] == 200
    assert last["R@10"]["low"] > 0.60 and last["R@1"]["low"] > 0.28
    assert last["gain_in_all"]["R@1"]["low"] > 0.04 and last["gain_in_all"]["R@1"]["p"] < 1e-6
    assert first["R@1"]["high"] < last["R@1"]["low"]
    by_text = {row["text"]: row["R@1"] for row in found["chinese"]}
    assert by_text["characters"]["low"] > by_text["MiniLM"]["high"]


def test_speed_as_the_chapter_states_it():
    one, stream = result("preprocessing"), result("preprocessing", 1)
    assert one["largest_difference"] < 1e-5
    assert one["ratio"]["low"] > 1 and one["draft_ratio"]["low"] > one["ratio"]["high"]
    assert stream["ratio"]["low"] >= 1.6 and stream["threads"] == 1
    assert 2 / 3 < stream["prepare"] / stream["model"] < 3 / 2  # two halves, nearly


@pytest.mark.parametrize("part", ["ocr", "retrieval", "preprocessing"])
def test_the_parts_are_functions_of_this_package(part):
    assert all(name.startswith("measured.experiments.multimodal") for name, _ in record.PARTS[part])
