"""Side-by-side timings from the command line: ``python -m measured.bench decode``.

Also ``window``, ``moe``, ``int4``, ``fusion`` (a token after a look at a picture), and ``evaluate`` (against lm-eval;
takes minutes, ``--every 4`` asks a quarter).

Prints medians, quartiles and ratios, with the share of this machine's measured read bandwidth or beside the bound.
Nothing else should run on the machine meanwhile.
"""

import argparse
import itertools
import sys

import torch

from dslib.architecture.weights.pretrained import load_smollm2
from dslib.performance.accuracy import PROMPTS
from dslib.performance.speed import bytes_per_token
from measured.experiments.accuracy import against_lm_eval
from measured.experiments.decoder import decode_comparison, window_speed
from measured.experiments.fusion_speed import look_cost
from measured.experiments.int4_speed import decode_int4, int4_grid
from measured.experiments.moe_speed import SHAPES, TOKENS, moe_speed, ratios
from measured.machine import describe
from measured.probes import read_bandwidth

PROMPT = "The history of the steam engine begins"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m measured.bench", description=__doc__)
    parser.add_argument("what", choices=("decode", "window", "moe", "int4", "fusion", "evaluate"))
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (decode)")
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(moe, evaluate)")
    parser.add_argument("--precision", choices=("highest", "medium"), default="highest", help="of matmuls (moe)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 1024], help="hidden sizes (moe)")
    parser.add_argument("--training", action="store_true", help="forward and backward pass (moe)")
    parser.add_argument("--every", type=int, default=1, help="ask every so many questions (evaluate)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(f"{describe()}; {options.threads} threads")
    ways = {"decode": decode, "window": window, "moe": moe, "int4": int4, "fusion": fusion, "evaluate": evaluate}
    ways[options.what](options)
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


def int4(options: argparse.Namespace) -> None:
    """One row a product: milliseconds of every way; then a whole model's tokens a second."""
    for point in int4_grid(rounds=options.rounds)["points"]:
        each = {name: run.median / point["layers"][name] for name, run in point["seconds"].items()}
        place = f"2048 to {point['out_features']}, {point['rows']} rows, groups of {point['group_size']}"
        print(f"{place}: {', '.join(f'{name} {seconds * 1e3:.3g}' for name, seconds in each.items())} ms")
        ours = min(each["ours"], each["ours, float32"])
        print("  over ours:", ", ".join(f"{name} {s / ours:.2f}" for name, s in each.items() if "ours" not in name))
    result = decode_int4(options.tokens, options.rounds)
    print(f"SmolLM2-135M, batch 1, {options.tokens} new tokens, greedy")
    for name, run in result["seconds"].items():
        print(f"  {name:28} {options.tokens / run.median:6.1f} tokens/s")


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


def evaluate(options: argparse.Namespace) -> None:
    """SmolLM2 on the 281 items of MMLU, scored by letter and by full text, ours against lm-eval."""
    for prompt in ("mmlu", "text"):
        found = against_lm_eval(prompt, options.dtype, every=options.every, rounds=options.rounds)
        print(f"\n{found['n']} questions, answers by {PROMPTS[prompt].answer}, {options.dtype}; same answers "
              f"{found['same_answers']}, largest difference {found['largest_difference']:.1e} nats")  # fmt: skip
        for way in ("lm_eval", "ours", "ours_same_kernel"):
            if way in found:
                print(f"  {way:17} {found[way]}, {found['n'] / found[way].median:5.1f} questions/s")
        print(f"  ours is {found['times']:.2f} times as fast as lm-eval at its best batch size, {found['batch_size']}; "
              f"{found['times_same_kernel']:.2f} times with products by the same library", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
