"""Train the course's own model: ``make model``, in one go or in pieces.

    python -m tools.model [--minutes 10] [--steps 2000] [--out trained/tiny-deepseek]
    python -m tools.model --ship        copy what was trained into data/tiny-deepseek, hashes and history with it

It first measures what this machine does, and prints the plan. A run that was stopped (by ``--minutes``, Ctrl-C, a power
cut) goes on from its checkpoint by the same command, and ends in the same weights. Needs nothing but this checkout,
torch, transformers and numpy; with CUDA it trains there.
"""

import argparse
import ctypes
import json
import shutil
import sys
import time
from pathlib import Path

import torch

from dslib.architecture.decoder import count_parameters
from dslib.architecture.generation import Sampling, generate
from dslib.architecture.whole import HASHES, PREDICTION, WEIGHTS, Whole, save
from dslib.data.corpus import token_stream, tokenizer
from dslib.data.text import slices
from dslib.fast.training_step import compiler
from dslib.performance.pretrain import (
    WINDOW,
    WINDOWS,
    Plan,
    Progress,
    bits_per_byte,
    byte_lengths,
    pretrain,
    training_flops,
)  # fmt: skip
from measured import machine, probes, recordings
from measured.experiments.whole import window_lines
from measured.timing import measure

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "data" / "tiny-deepseek"
PROMPT = "The people of the United States"
CHECKPOINT, HISTORY = "checkpoint.pt", "history.json"


def precision_here(device: torch.device) -> str:
    """bfloat16 where this machine multiplies in it at least half again as quickly as in float32."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float32"
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 256, dtype=dtype), torch.randn(256, 1024, dtype=dtype)
        rates[dtype] = 1 / measure(lambda a=a, b=b: a @ b, max_seconds=0.5).median
    return "bfloat16" if rates[torch.bfloat16] > 1.5 * rates[torch.float32] else "float32"


class Run:
    """One run in one folder: its history, what it prints, and when it saves the weights."""

    def __init__(self, folder: Path, plan: Plan, minutes: float | None):
        self.folder, self.plan, self.minutes = folder, plan, minutes
        folder.mkdir(parents=True, exist_ok=True)
        self.device = machine.best_device() if torch.cuda.is_available() else torch.device("cpu")
        torch.manual_seed(plan.seed)
        self.model = Whole().to(self.device)
        self.tokens, size = token_stream("train")
        self.bytes_a_token = size / len(self.tokens)
        validation = torch.from_numpy(token_stream("validation")[0].astype("int64"))
        self.windows, self.lengths = slices(validation, WINDOW, WINDOWS), byte_lengths(tokenizer())
        path = folder / HISTORY
        self.history = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        self.before = 0.0  # seconds of earlier pieces
        self.start = self.last = time.perf_counter()
        self.durations: list[float] = []  # of the last steps

    def prepare(self) -> None:
        self.precision = precision_here(self.device)
        dtype = getattr(torch, self.precision)
        self.rate = probes.product_rate(dtype, self.device)
        work = training_flops(self.model, self.plan)
        parameters = count_parameters(self.model)
        seconds = self.plan.steps * self.plan.tokens * work / (0.4 * self.rate)
        print(f"{machine.describe(self.device)}")
        fused = f"fused by {compiler()}" if compiler() else "not fused, for want of a C++ compiler"
        print(
            f"{parameters / 1e6:.2f}M parameters, {work / 6e6:.2f}M multiplied by for a token; {self.precision} at "
            f"{self.rate / 1e9:.0f} GFLOP/s, {fused}"
        )
        counted = recordings.recorded(window_lines)
        self.lines = counted.result if counted else {}
        if self.lines:
            lines = ", ".join(f"{order}-gram {bits:.3f}" for order, bits in self.lines.items() if order != "1")
            print(f"what counting reaches on the windows that are looked at, in bits a byte: {lines}")
        total = self.plan.steps * self.plan.tokens
        print(
            f"plan: {self.plan.steps} steps of {self.plan.tokens:,} tokens, {total / len(self.tokens):.1f} times the "
            f"text; at 40 % of that rate about {seconds / 60:.0f} minutes"
        )

    def tell(self, at: Progress) -> bool:
        """One line every 25 steps; every 100, the validation windows, and a text at a few of them. True ends it."""
        now = time.perf_counter()
        self.durations = [*self.durations[-20:], now - self.last]
        ends = self.minutes is not None and now - self.start >= 60 * self.minutes
        if at.step % 25 == 0 or at.step == at.steps or ends:
            self.write(at, now - self.start, self.plan.tokens / sorted(self.durations)[len(self.durations) // 2])
        self.last = time.perf_counter()
        return ends

    def write(self, at: Progress, seconds: float, speed: float) -> None:
        if not self.before and self.history:
            self.history = [row for row in self.history if row["step"] < at.step]
            self.before = self.history[-1]["seconds"] if self.history else 0.0
        row = {
            "step": at.step, "tokens": at.step * self.plan.tokens, "seconds": round(self.before + seconds, 3),
            "bits": round(at.bits, 4), "after_next": round(at.after_next, 4), "busiest": round(at.busiest, 3),
            "tokens_per_second": round(speed),
        }  # fmt: skip
        if at.step % 100 == 0 or at.step == at.steps:
            row["validation"] = round(bits_per_byte(self.model, self.windows.to(self.device), self.lengths), 4)
        if at.step in (100, 400) or at.step % 800 == 0 or at.step == at.steps:
            row["text"] = self.text()
        self.history.append(row)
        (self.folder / HISTORY).write_text(json.dumps(self.history, indent=0) + "\n", encoding="utf-8")
        share = speed * training_flops(self.model, self.plan) / self.rate
        left = (at.steps - at.step) * self.plan.tokens / speed / 60
        seen = f", validation {row['validation']:.3f}" if "validation" in row else ""
        if passed := [order for order, bits in self.lines.items() if row.get("validation", 9) < bits]:
            seen += f" (below the {passed[-1]}-gram)"
        print(
            f"{at.step:5}/{at.steps}  {row['seconds'] / 60:5.1f} min  {at.bits:.3f} bits a byte{seen}  "
            f"{speed:,.0f} tokens/s ({share:.0%} of products' rate)  busiest expert {at.busiest:.2f} x "
            f"mean  {left:.0f} min left",
            flush=True,
        )
        if "text" in row:
            print(f"       {row['text']!r}", flush=True)

    def text(self) -> str:
        """How the model goes on with PROMPT at temperature 0.8, seed 0."""
        ids = [tokenizer().eos_token_id, *tokenizer().encode(PROMPT, add_special_tokens=False)]
        made = generate(self.model.decoder, [ids], 48, sampling=Sampling(temperature=0.8), seed=0)
        return PROMPT + tokenizer().decode(made[0].tokens)

    def go(self) -> bool:
        """Whether the plan is done."""
        self.prepare()
        losses = pretrain(
            self.model, self.tokens, self.bytes_a_token, self.plan, self.folder / CHECKPOINT, precision=self.precision,
            on_progress=self.tell,
        )  # fmt: skip
        save(self.model.eval(), self.folder)
        return len(losses) == self.plan.steps


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed. It would give large blocks back, and their pages would have to be made
    anew in every step: a fifth of the time on two cores."""
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return  # not glibc
    trim_threshold, mmap_max = -1, -4
    library.mallopt(mmap_max, 0)
    library.mallopt(trim_threshold, 2**31 - 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on later")
    parser.add_argument("--steps", type=int, default=Plan().steps)
    parser.add_argument("--out", type=Path, default=ROOT / "trained" / "tiny-deepseek")
    parser.add_argument("--ship", action="store_true", help="copy what --out holds into data/tiny-deepseek")
    asked = parser.parse_args()
    if asked.ship:
        for name in ("config.json", WEIGHTS, PREDICTION, HASHES, HISTORY):
            shutil.copy(asked.out / name, SHIPPED / name)
        return 0
    keep_freed_memory()
    done = Run(asked.out, Plan(steps=asked.steps), asked.minutes).go()
    print(f"{'done' if done else 'stopped; the same command goes on'}: {asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
