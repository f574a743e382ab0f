import pytest
import torch

from measured import machine as device
from measured import probes
from measured.machine import Machine

NAN, THREADS = float("nan"), torch.get_num_threads()


def machine(**changes):
    facts = {"kind": "cpu", "name": "AMD EPYC 9V74", "cores": 2, "threads": 2, "memory_bytes": 8 * 10**9}
    facts |= {"cache_bytes": 32 * 2**20, "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
    return Machine(**(facts | changes))


def test_best_device_can_compute():
    best = device.best_device()
    assert best.type in device.KINDS
    assert torch.ones(2, device=best).sum().item() == 2
    device.synchronize(best)
    device.synchronize()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [(name, "one of cuda, mps, cpu") for name in ("gpu", "xpu", "meta", 3.5)] + [("cuda:99", "one that is here")],
)
def test_an_unknown_or_absent_device_is_named(name, wanted):
    with pytest.raises(ValueError, match=f"device: got {name!r}, wanted {wanted}"):
        device.as_device(name)


def test_description_of_this_machine():
    here = device.describe("cpu")
    assert here.kind == "cpu" and here.driver is None and here.torch == torch.__version__
    assert here.cores >= 1 and here.threads >= 1 and here.memory_bytes > 10**8
    assert here.name in here._repr_markdown_() and "<caption" in here._repr_html_()


@pytest.mark.parametrize(
    ("changes", "slug"),
    [
        ({}, "amd-epyc-9v74-2-cores"),
        ({"name": "Intel(R) Xeon(R) CPU @ 2.20GHz"}, "intel-xeon-2-cores"),
        ({"name": "AMD EPYC", "isa": "AVX-512 BF16"}, "amd-epyc-avx512-bf16-2-cores"),
        ({"kind": "cuda", "name": "NVIDIA A100-SXM4-80GB"}, "nvidia-a100-sxm4-80gb"),
        ({"name": "???"}, "unknown-2-cores"),
    ],
)
def test_slug_is_a_file_name(changes, slug):
    assert machine(**changes).slug() == slug


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("sse2 avx2 fma", None),
        ("avx2 avx512f avx512_vnni avx512_bf16", "AVX-512 BF16"),
        ("avx512f amx_tile", "AMX"),
        (None, None),  # a system that hides them
    ],
)
def test_generations_of_a_cpu_are_told_apart_by_their_instructions(monkeypatch, flags, isa):
    monkeypatch.setattr(device.Path, "exists", lambda self: flags is not None)
    monkeypatch.setattr(device.Path, "read_text", lambda self, errors: f"model name\t: AMD EPYC\nflags\t\t: {flags}\n")
    assert device.cpu_isa() == isa


def test_unknown_versions_are_left_out():
    assert machine(transformers=None).versions() == {"python": "3.11.7", "torch": "2.13.0"}
    assert "cuda" in machine(cuda="12.8").versions()
    assert "last-level cache" not in machine(cache_bytes=None)._repr_markdown_()


def test_a_machine_that_hides_its_cache(monkeypatch):
    monkeypatch.setattr(device.Path, "glob", lambda self, pattern: iter(()))
    assert device.cpu_cache() is None or device.sys.platform == "darwin"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *(
            (lambda size=size: probes.copy_bandwidth("cpu", size=size), f"size: got {size}")
            for size in (0, -4, 1.5, NAN)
        ),
        *(
            (lambda size=size: probes.product_rate("float32", "cpu", size), f"size: got {size}")
            for size in (0, -1, 64.0)
        ),
        *((lambda t=t: probes.read_bandwidth("cpu", 64, threads=t), f"threads: got {t}") for t in (0, -1, 0.5, NAN)),
        *(
            (lambda s=seconds: probes.measure_roof("cpu", ["float32"], max_seconds=s), "max_seconds: got")
            for seconds in (0, -1.0, NAN, float("inf"))
        ),
        (lambda: probes.measure_roof("cpu", ["float7"]), "float7"),
        (lambda: probes.launch_gap(side=16, rounds=-2), "seconds: got no readings"),
    ],
)
def test_bad_input_of_the_probes_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.get_num_threads() == THREADS
