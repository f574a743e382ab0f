import pytest

from measured.experiments import sampling


def test_times_name_every_rule_and_the_sort():
    found = sampling.sampling_times(vocab_size=500, batch=2, rounds=2)
    assert set(found) == {*sampling.RULES, "one sort"} and all(run.median > 0 and run.n == 2 for run in found.values())


@pytest.mark.parametrize(("arguments", "word"), [({"rounds": 0}, "rounds")])
def test_bad_input(arguments, word):
    with pytest.raises(ValueError, match=word):
        sampling.sampling_times(**arguments)
