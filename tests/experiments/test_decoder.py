"""The measuring functions: what they count and compare. No test asserts a time."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dslib import fast
from dslib.architecture import decoder
from dslib.architecture.weights.twin import hf_twin
from dslib.performance import speed as speed_lib
from measured import probes, provenance, record, recordings
from measured.experiments import adapters_many as many_runs
from measured.experiments import balance, does_it_help, moe_speed, sampling, speed, training_precision, upcycling, whole
from measured.experiments import decoder as decoder_runs


def test_bytes_a_token_reads():
    tied = decoder.build(decoder.preset("tiny"), device="meta")
    assert speed_lib.bytes_per_token(tied) == 4 * decoder.count_parameters(tied)
    untied = decoder.build(decoder.preset("tiny", tie_word_embeddings=False), device="meta", dtype=torch.bfloat16)
    unread = untied.lm_head.weight.numel() - 128  # of the embedding, one row is looked up
    assert speed_lib.bytes_per_token(untied) == 2 * (decoder.count_parameters(untied) - unread)
    # 10 tokens of context: keys and values, 4 layers, 2 heads of 32, 2 bytes
    assert speed_lib.bytes_per_token(untied, 10) - speed_lib.bytes_per_token(untied) == 10 * 2 * 4 * 2 * 32 * 2


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "rope_scaling": 4.0, "rope_theta": 1e5}])
def test_the_twin_has_the_same_logits(changes):
    model = decoder.build(decoder.preset("tiny", **changes), seed=0).eval()
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(model(ids), hf_twin(model)(ids).logits, atol=1e-4)


def test_no_twin_for_what_llama_is_not():
    with pytest.raises(ValueError, match="window"):
        hf_twin(decoder.build(decoder.preset("tiny", sliding_window=8)))


def test_comparison_of_decoding():
    model = decoder.build(decoder.preset("tiny"), seed=0).eval()
    result = decoder_runs.decode_comparison(model, [1, 2, 3], new_tokens=5, rounds=2)
    assert result["same_tokens"] is True
    assert result["times"] > 0 and result["times_same_kernel"] > 0 and result["ours"].n == 2
    assert not fast.is_prepared(model), "the model is as it was"


def test_comparison_of_windows():
    result = decoder_runs.window_speed(length=200, window=32, heads=2, head_dim=16, rounds=2)
    assert result["largest_difference"] < 1e-5 and result["times_band"] > 0


ROOT = Path(__file__).resolve().parents[2]
KEY = ("--commit", "0" * 40, "--tree", provenance.tree_here())  # as told on a machine without git

# A bare machine: our code imports torch, transformers, numpy and the standard library only. There is no network.
BARE = """
import builtins, socket, sys
for name in ("matplotlib", "gguf", "accelerate", "onnxruntime", "IPython", "ipywidgets", "pandas", "scipy", "datasets"):
    sys.modules[name] = None
import gc, torch
gc.freeze()  # what torch brings need not be looked through before each reading of a time
real, known = builtins.__import__, {"torch", "transformers", "numpy", "dslib", "measured", *sys.stdlib_module_names}
def ours_only(name, globals=None, locals=None, fromlist=(), level=0):
    who = (globals or {}).get("__name__", "")
    if who.startswith(("dslib", "measured")) and not level and name.split(".")[0] not in known:
        raise ImportError(f"{who} imports {name}")
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = ours_only
def refuse(*_, **__):
    raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
from measured import probes, record
probes.buffer_bytes = lambda device=None: 2**22  # that it is called and kept is shown, not how fast a memory is
first = {name: (name, call) for name, call in reversed(record.CPU_CALLS)}  # test_speed.py has the other designs
record.PARTS["machine"] = tuple(first.values())
sys.exit(record.main(["machine", "--out", *sys.argv[1:]]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="proves the command on a CPU")
def test_record_writes_a_file_that_reads_back_on_a_bare_machine(tmp_path):
    out, copy = tmp_path / "machine.json", tmp_path / "copy"  # the files alone, without git
    for package in ("dslib", "measured"):
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data").mkdir()
    done = subprocess.run([sys.executable, "-c", BARE, str(out), *KEY], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    made = recordings.read(out)
    assert sorted({r.function.split(":")[1] for r in made}) == [
        "decode_speed", "launch_gap", "machine_speed", "roof_figures", "training_step", "window_speed",
    ]  # fmt: skip
    assert {recordings.standing(r) for r in made} == {"current"}
    assert out.stat().st_size < 100_000
    tables = [r.result for r in made if r.function.endswith("machine_speed")]
    assert not [row for table in tables for row in table["rows"] if "failed" in row]


def test_a_call_that_fails_does_not_lose_the_others(tmp_path, monkeypatch, capsys):
    calls = (("measured.probes:no_such_thing", {}), ("measured.probes:launch_gap", {"side": 16, "rounds": 1}))
    monkeypatch.setitem(record.PARTS, "machine", calls)
    assert record.main(["--out", str(tmp_path / "a.json"), *KEY]) == 1
    assert len(recordings.read(tmp_path / "a.json")) == 1 and "1 calls failed" in capsys.readouterr().out


@pytest.mark.parametrize("part", record.PARTS)
def test_every_call_that_is_named_exists(part):
    for name, call in (*record.PARTS[part], *record.GPU_CALLS):
        recordings._bind(record.find(name), call)


def gpu_calls():
    """Every ``recordings.live_or_recorded(module.function, …)`` in the chapters, as (function, arguments)."""
    modules = {"probes": probes, "moe_speed": moe_speed, "precision": training_precision, "speed_lab": speed}
    pages = {
        "adapters": {"many": many_runs},
        "balance": {"lab": balance},
        "cache": {"lab": decoder_runs},
        "decoder": {"lab": speed},
        "does_it_help": {"lab": does_it_help},
        "sampling": {"lab": sampling},
        "speed": {"lab": speed},
        "upcycling": {"lab": upcycling},
        "whole": {"lab": whole},
    }  # `lab` is the experiments of the page's chapter
    for path in sorted((Path(__file__).parents[2] / "chapters").rglob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "gpu" not in cell["metadata"].get("tags", []):
                continue
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "recordings.live_or_recorded":
                    module, _, name = ast.unparse(node.args[0]).partition(".")
                    arguments = {word.arg: ast.literal_eval(word.value) for word in node.keywords}
                    function = getattr((modules | pages.get(path.stem, {}))[module], name)
                    yield pytest.param(function, arguments, id=f"{path.stem}-{name}")


@pytest.mark.parametrize(("function", "arguments"), list(gpu_calls()))
def test_every_gpu_cell_can_be_recorded(function, arguments):
    """A GPU cell and ``make record`` must mean the same call, defaults included."""
    calls = [(fn, recordings._bind(fn, call)) for fn, call in ((record.find(name), c) for name, c in record.GPU_CALLS)]
    assert (function, recordings._bind(function, arguments)) in calls
