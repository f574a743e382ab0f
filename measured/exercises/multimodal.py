"""Exercises of ``chapters/scenarios/multimodal.ipynb``."""

import torch
from torch import Tensor

from measured.exercises import exercise, named, normal


def _scores(n: int, seed: int) -> Tensor:
    return normal(n, n, seed=seed, dtype=torch.float64) + 1.2 * torch.eye(n, dtype=torch.float64)


@exercise(
    "multimodal/resized",
    cases=[(1920, 1080, 224), (600, 800, 224), (500, 500, 96), (1001, 333, 64), (3, 7, 10)],
    mistakes="""
        (shorter, shorter)
            Both sides set: one number sets one side only.
        (shorter, int(shorter * height / width)) if width >= height else (int(shorter * width / height), shorter)
            You set the longer side. One number sets the shorter side, so the other comes out longer.
        resized(height, width, shorter)
            Width and height are swapped: the result has to lie as the picture lies.
        (shorter, int(shorter * height / width))
            You always set the width. That is the shorter side only of a picture that stands upright.
        tuple(-int(-side * shorter // min(width, height)) for side in (width, height))
            The longer side is rounded up. It is rounded down.
    """,
    hint="Which side is shorter? It becomes the number; multiply the other by the same factor and round down.",
)
def resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) once the shorter side has length ``shorter``: the other in proportion, rounded down."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


@exercise(
    "multimodal/canvas",
    cases=[
        {"width": 1920, "height": 1080, "tile": 384, "max_tiles": 9},
        {"width": 1080, "height": 1920, "tile": 384, "max_tiles": 9},
        {"width": 300, "height": 200, "tile": 384, "max_tiles": 9},
        {"width": 800, "height": 500, "tile": 384, "max_tiles": 9},
        {"width": 4000, "height": 500, "tile": 384, "max_tiles": 9},
        {"width": 700, "height": 600, "tile": 224, "max_tiles": 6},
    ],
    mistakes="""
        max(_grids(max_tiles), key=lambda grid: (grid[0] * grid[1], -abs(grid[0] / grid[1] - width / height)))
            You take as many tiles as there may be. A small picture would be spread over nine of them.
        min(_grids(max_tiles), key=lambda grid: (abs(grid[0] / grid[1] - width / height), grid[0] * grid[1]))
            You take the canvas of the nearest shape. A single tile may be nearest and still far too small: compare how
            many pixels of the picture each canvas keeps.
        max(_grids(max_tiles), key=lambda grid: (_pixels(width, height, tile, *grid), -grid[0] * grid[1]))
            You count pixels that enlarging invents. A canvas keeps at most as many as the picture has.
        best_canvas(width, height, tile, max_tiles)[::-1]
            Columns and rows are swapped: a wide picture needs more columns.
    """,
    hint="For each (columns, rows): fit the picture inside, count its pixels there, but no more than it has; take "
    "the most, and of equals the canvas with fewest tiles.",
)
def best_canvas(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) in which a picture keeps most pixels, without being enlarged; of equals the smallest."""

    def kept(columns: int, rows: int) -> int:
        return min(_pixels(width, height, tile, columns, rows), width * height)

    return max(_grids(max_tiles), key=lambda grid: (kept(*grid), -grid[0] * grid[1]))


@exercise(
    "multimodal/recall",
    cases=named("scores k", (_scores(8, 0), 1), (_scores(12, 1), 3), (_scores(20, 2), 5), (_scores(9, 3), 1)),
    mistakes="""
        recall(scores.T, k)
            You rank the queries for each item. Each query ranks the items: along its own row.
        ((scores > scores.diagonal().unsqueeze(1)).sum(1) <= k).double().mean().item()
            Off by one: with k others before it, the own item stands at place k + 1.
        ((scores < scores.diagonal().unsqueeze(1)).sum(1) < k).double().mean().item()
            You count the items that score less. Those that score more stand before it.
        ((scores > scores.diagonal().unsqueeze(1)).sum(1) < k).double().sum().item()
            That is how many queries succeed. Divide by how many there are.
        ((scores > scores.diagonal().unsqueeze(0)).sum(1) < k).double().mean().item()
            You compare each score with the diagonal of its column. A query's own score is in its own row.
    """,
    hint="In each row count the scores above the one on the diagonal; fewer than k of them is a success.",
)
def recall(scores: Tensor, k: int) -> float:
    """Share of queries (rows) whose own item (the column of the same number) is among the k best of its row."""
    own = scores.diagonal().unsqueeze(1)
    return ((scores > own).sum(1) < k).double().mean().item()


def _grids(max_tiles: int) -> list[tuple[int, int]]:
    return [(m, n) for m in range(1, max_tiles + 1) for n in range(1, max_tiles // m + 1)]


def _pixels(width: int, height: int, tile: int, columns: int, rows: int) -> int:
    scale = min(columns * tile / width, rows * tile / height)
    return int(width * scale) * int(height * scale)
