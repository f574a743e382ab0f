"""Exercises of ``chapters/start/your_machine.ipynb``."""

from measured.exercises import exercise


@exercise(
    "your_machine/decode-floor",
    cases=[
        {"parameters": 1.3e9, "bytes_per_weight": 2, "bandwidth": 300e9},
        {"parameters": 7e9, "bytes_per_weight": 0.5, "bandwidth": 2.039e12},
        {"parameters": 135e6, "bytes_per_weight": 4, "bandwidth": 40e9},
    ],
    tolerance=1e-3,
    mistakes="""
        parameters * bytes_per_weight / bandwidth
            That is in seconds. The question asks for milliseconds: there are 1000 in a second.
        parameters * bytes_per_weight * 8 / bandwidth * 1000
            Eight times too long: you counted bits. The bandwidth here is in bytes per second.
        parameters * bytes_per_weight / 2**30 / (bandwidth / 1e9) * 1000
            7 % too short: GiB (2**30 bytes) for the weights met GB (10**9 bytes) for the bandwidth. Keep both in bytes.
        bytes_per_weight / bandwidth * 1000
            That reads one weight. Each new token needs all of them.
        parameters / bandwidth * 1000
            That gives every weight one byte. How many bytes does a weight take?
        2 * parameters * bytes_per_weight / bandwidth * 1000
            Twice too long. Two operations per weight is a count of FLOPs; a weight is read once.
        bandwidth / (parameters * bytes_per_weight)
            That is tokens per second. The question asks for the time of one token.
    """,
    hint="Bytes to read, divided by bytes per second, in milliseconds.",
)
def decode_floor(parameters: float, bytes_per_weight: float, bandwidth: float) -> float:
    """Least milliseconds per generated token when every weight is read once; bandwidth in bytes per second."""
    return parameters * bytes_per_weight / bandwidth * 1000


@exercise(
    "your_machine/which-bound",
    # The roofs: one with ridge 100 FLOP/byte, one with ridge 20. The shapes lie on both sides of each ridge, and
    # between the true intensity and what each mistake would take for it.
    cases=[
        {"m": 110, "k": 4096, "n": 4096, "bytes_per_number": 2, "bandwidth": 1e12, "flops": 100e12},
        {"m": 120, "k": 512, "n": 512, "bytes_per_number": 2, "bandwidth": 1e12, "flops": 100e12},
        {"m": 4096, "k": 100, "n": 4096, "bytes_per_number": 2, "bandwidth": 1e12, "flops": 100e12},
        {"m": 4096, "k": 4096, "n": 100, "bytes_per_number": 2, "bandwidth": 1e12, "flops": 100e12},
        {"m": 64, "k": 1024, "n": 1024, "bytes_per_number": 4, "bandwidth": 50e9, "flops": 1e12},
        {"m": 30, "k": 1024, "n": 1024, "bytes_per_number": 4, "bandwidth": 50e9, "flops": 1e12},
    ],
    mistakes="""
        which_bound(m, k, n, bytes_per_number, bandwidth, 2 * flops)
            Close. Each of the m·k·n steps is a multiplication and an addition: two operations.
        "compute" if 2 * m * k * n / flops >= bytes_per_number * k * n / bandwidth else "bandwidth"
            You counted the bytes of the (k, n) matrix only. The input is read and the result written too; for small
            matrices that decides.
        "compute" if 2 * m * k * n / flops >= bytes_per_number * (m * k + k * n) / bandwidth else "bandwidth"
            You counted what is read. The result has to be written, and where k is small it is the largest of the three.
        which_bound(m, k, n, 1, bandwidth, flops)
            You counted numbers, not bytes. Each number takes bytes_per_number bytes.
        {"compute": "bandwidth", "bandwidth": "compute"}[which_bound(m, k, n, bytes_per_number, bandwidth, flops)]
            The other way round: the bound is the one that takes longer, not shorter.
    """,
    hint="Compare two times: operations / flops, and bytes / bandwidth. The longer one is the bound.",
)
def which_bound(m: int, k: int, n: int, bytes_per_number: int, bandwidth: float, flops: float) -> str:
    """The bound that holds for an (m, k) by (k, n) matrix product: ``"bandwidth"`` or ``"compute"``."""
    work = 2 * m * k * n
    moved = bytes_per_number * (m * k + k * n + m * n)
    return "compute" if work / flops >= moved / bandwidth else "bandwidth"
