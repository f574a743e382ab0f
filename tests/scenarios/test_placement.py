"""What no placement can be made of. (That the placements are good is tested with the experiment that uses them.)"""

import math

import numpy as np
import pytest
import torch

from dslib.scenarios.placement import imbalance, place_experts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: place_experts([], 1), "load, experts: got 0"),
        (lambda: place_experts([1, math.nan], 1), "load: got nan"),
        (lambda: place_experts([1, -1], 1), "load: got -1"),
        (lambda: place_experts([1, 2], 0), "gpus: got 0"),
        (lambda: place_experts([1, 2], 1, -1), "copies: got -1"),
        (lambda: place_experts([1, 2, 3], 2), "gpus, copies: got 2 and 0, expected 3 experts"),
        (lambda: imbalance([1, 1], [[0], [0]]), "copies of expert 1: got 0"),
        (lambda: imbalance([0, 0], [[0], [1]]), "load, sum: got 0"),
        (lambda: imbalance([1, math.nan], [[0], [1]]), "load: got nan"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_every_kind_of_numbers_is_a_load(kind):
    placed = place_experts(kind([1.0, 2.0, 3.0, 4.0]), kind([2])[0])
    assert placed == [[3, 0], [2, 1]] and imbalance(kind([1.0, 2.0, 3.0, 4.0]), placed) == 1
