"""Side-by-side timings from the command line: ``python -m dslib.performance.bench decode`` (or ``window``).

Prints medians, quartiles and ratios, with the share of this machine's measured read bandwidth. Nothing else should run
on the machine meanwhile.
"""

import argparse
import sys

import torch

from dslib.data.pretrained import load_smollm2
from dslib.lab.device import describe
from dslib.lab.probes import read_bandwidth
from dslib.performance.speed import bytes_per_token, decode_comparison, window_speed

PROMPT = "The history of the steam engine begins"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dslib.performance.bench", description=__doc__)
    parser.add_argument("what", choices=("decode", "window"))
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (decode)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{describe()}; {options.threads} threads")
    (decode if options.what == "decode" else window)(options)
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
        for way in ("transformers", "ours", "ours_same_kernel"):
            if way in result:
                seconds = result[way].median / options.tokens
                share = f"{floor / seconds:4.0%} of the read bandwidth"
                print(f"  {way:17} {seconds * 1e3:6.1f} ms a token, {1 / seconds:6.1f} tokens/s, {share}")
        print(f"  ours is {result['times']:.2f} times as fast, each side as it comes")
        if exact:
            print(f"  ours is {result['times_same_kernel']:.2f} times as fast, both on F.linear")


def window(options: argparse.Namespace) -> None:
    result = window_speed(rounds=options.rounds)
    for way in ("blocks", "causal", "band"):
        print(f"  {way:7} {result[way]}")
    print(f"  blocks are {result['times_band']:.1f} times as fast as a band mask, {result['times_causal']:.1f} times "
          f"as fast as full causal; largest difference {result['largest_difference']:.1e}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
