"""Playing a lesser processor: every library is told, and what is printed is what it says."""

import os

import pytest
import torch

from tools import processor


def test_only_lesser_processors_can_be_played():
    levels, here = list(processor.LEVELS), torch.backends.cpu.get_cpu_capability()
    assert processor.lesser() == (levels[levels.index(here) + 1 :] if here in levels else [])


@pytest.mark.parametrize("level", processor.lesser())
def test_the_libraries_use_what_they_were_told(level):
    found = processor.used(processor.environment(level))
    assert found["torch"] == level
    assert ("SSE4.1" if level == "DEFAULT" else "AVX2") in found["oneDNN"]


def test_what_was_set_before_does_not_leak(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert "ONEDNN_MAX_CPU_ISA" not in processor.environment("AVX512")
    assert processor.environment("AVX2").items() >= processor.LEVELS["AVX2"].items()
    assert processor.environment("AVX2")["PATH"] == os.environ["PATH"]
