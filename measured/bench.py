"""Side-by-side timings from the command line: ``python -m measured.bench decode``.

Also ``window``, ``moe`` and ``fusion`` (a token after a look at a picture).

Prints medians, quartiles and ratios, with the share of this machine's measured read bandwidth or beside the bound.
Nothing else should run on the machine meanwhile.
"""

import argparse
import itertools
import sys

import torch

from dslib.architecture.weights.pretrained import load_smollm2
from dslib.performance.speed import bytes_per_token
from measured.experiments.decoder import decode_comparison, window_speed
from measured.experiments.fusion_speed import look_cost
from measured.experiments.moe_speed import SHAPES, TOKENS, moe_speed, ratios
from measured.machine import describe
from measured.probes import read_bandwidth

PROMPT = "The history of the steam engine begins"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m measured.bench", description=__doc__)
    parser.add_argument("what", choices=("decode", "window", "moe", "fusion"))
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (decode)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(moe)")
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest", help="of matmuls (moe)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024], help="hidden sizes (moe)")
    parser.add_argument("--training", action="store_true", help="forward and backward pass (moe)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{describe()}; {options.threads} threads")
    {"decode": decode, "window": window, "moe": moe, "fusion": fusion}[options.what](options)
    return 0


def decode(options: argparse.Namespace) -> None:
    read = read_bandwidth("cpu")
    print(f"read bandwidth {read / 1e9:.1f} GB/s; SmolLM2-135M, batch 1, {options.tokens} new tokens, greedy")
    for dtype in (torch.float32, torch.bfloat16):
        model, tokenizer = load_smollm2(dtype=dtype)
        prompt = tokenizer(PROMPT).input_ids
        exact = dtype is torch.float32
        result = decode_comparison(model, prompt, options.tokens, options.rounds, kernels=exact)
        floor = bytes_per_token(model) / read
        print(f"\n{str(dtype)[6:]}   same tokens: {result['same_tokens']}")
        for way in ("transformers", "plain", "ours", "ours_same_kernel"):
            if way in result:
                seconds = result[way].median / options.tokens
                share = f"{floor / seconds:4.0%} of the read bandwidth"
                print(f"  {way:17} {seconds * 1e3:6.1f} ms a token, {1 / seconds:6.1f} tokens/s, {share}")
        print(f"  ours is {result['times']:.2f} times as fast prepared, {result['times_plain']:.2f} as it comes")
        if exact:
            print(f"  ours is {result['times_same_kernel']:.2f} times as fast, both on F.linear")


def window(options: argparse.Namespace) -> None:
    result = window_speed(rounds=options.rounds)
    for way in ("blocks", "causal", "band"):
        print(f"  {way:7} {result[way]}")
    print(f"  blocks are {result['times_band']:.1f} times as fast as a band mask, {result['times_causal']:.1f} times "
          f"as fast as full causal; largest difference {result['largest_difference']:.1e}")  # fmt: skip


def fusion(options: argparse.Namespace) -> None:
    for every in (1, 4):
        found = look_cost(every=every, rounds=options.rounds)
        where = "every layer" if every == 1 else f"every {every} layers"
        print(f"\nSmolLM2's shape, float32, 16 tokens behind 64; cross-attention before {where}")
        for way, run in found["seconds"].items():
            times = f"{found['over_text'][way]:.2f} of text, {found['over_equal_size'][way]:.2f} at equal size"
            print(f"  {way:16} {run.median / 16 * 1e3:6.2f} ms a token, {times}")


def moe(options: argparse.Namespace) -> None:
    """One row a point of the grid: milliseconds of every way, then what they say. Prints each point as it comes."""
    what = "forward and backward" if options.training else "forward"
    print(f"one layer of experts, {what}, {options.dtype}, matmul precision {options.precision}; milliseconds")
    for hidden_size in options.hidden:
        for (experts, top_k), tokens in itertools.product(SHAPES, TOKENS):
            place = {"hidden_size": hidden_size, "num_experts": experts, "top_k": top_k, "tokens": tokens}
            point = moe_speed(
                **place, dtype=options.dtype, training=options.training, precision=options.precision,
                rounds=options.rounds,
            )  # fmt: skip
            times = ", ".join(f"{name} {run.median * 1e3:.3g}" for name, run in point["seconds"].items())
            said = ratios(point)
            print(f"\nhidden {hidden_size}, {experts} experts, top {top_k}, tokens {tokens}: {times}")
            print(f"  transformers' default over ours {said['default']:.2f}, its best over ours {said['best']:.2f}, "
                  f"eager over ours {said['eager']:.2f}; ours over the dense bound {said['bound']:.2f}; "
                  f"largest difference {point['largest_difference']:.0e}", flush=True)  # fmt: skip
            for name, why in point["failed"].items():
                print(f"  {name} does not run: {why}")


if __name__ == "__main__":
    sys.exit(main())
