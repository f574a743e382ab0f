"""The arithmetic of training costs agrees with what DeepSeek published of its own."""

import math
import subprocess
import sys

import pytest

from dslib.data import published_figures
from dslib.performance.pretraining import achieved_rate, days, gpu_hours, training_flops


def test_hours_rate_and_operations_turn_into_each_other():
    flops = training_flops(1e9, 20e9)
    hours = gpu_hours(flops, 100e12)
    assert flops == 1.2e20 and hours == pytest.approx(1.2e20 / 1e14 / 3600)
    assert achieved_rate(flops, hours) == pytest.approx(100e12) and days(48, 2) == 1


def test_v3s_own_figures_agree_with_each_other():
    """180K hours a trillion tokens, 2,664K in all, 3.7 days a trillion on 2,048 cards, stated as three figures."""
    names = ("pretraining_gpu_hours", "training_tokens", "gpu_hours_per_trillion", "training_gpus", "gpu_hours")
    hours, tokens, per_trillion, gpus, every = (published_figures.figure("deepseek_v3", one).value for one in names)
    assert hours / (tokens / 1e12) == pytest.approx(per_trillion, rel=0.001)
    assert days(per_trillion, gpus) == pytest.approx(3.7, abs=0.05) and hours < every


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("function", "names"),
    [
        (training_flops, ("active_parameters", "tokens")),
        (achieved_rate, ("flops", "gpu_hours")),
        (gpu_hours, ("flops", "rate")),
        (days, ("gpu_hours", "gpus")),
    ],
)
def test_bad_input_is_named(function, names, bad):
    for name in names:
        with pytest.raises(ValueError, match=f"{name}: got {bad}, expected a number above 0"):
            function(**{**dict.fromkeys(names, 1.0), name: bad})


def test_it_needs_no_torch():
    code = "import sys, dslib.performance.pretraining; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
