"""Exercises of ``chapters/scenarios/multimodal.ipynb``."""

import torch
from torch import Tensor

from measured.exercises import Exercise, Mistake


def resized(width: int, height: int, shorter: int) -> tuple[int, int]:
    """(width, height) once the shorter side has length ``shorter``: the other in proportion, rounded down."""
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def best_canvas(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    """(columns, rows) in which a picture keeps most pixels, without being enlarged; of equals the smallest."""

    def kept(columns: int, rows: int) -> int:
        scale = min(columns * tile / width, rows * tile / height)
        return min(int(width * scale) * int(height * scale), width * height)

    return max(_grids(max_tiles), key=lambda grid: (kept(*grid), -grid[0] * grid[1]))


def recall(scores: Tensor, k: int) -> float:
    """Share of queries (rows) whose own item (the column of the same number) is among the k best of its row."""
    own = scores.diagonal().unsqueeze(1)
    return ((scores > own).sum(1) < k).double().mean().item()


def _grids(max_tiles: int) -> list[tuple[int, int]]:
    return [(m, n) for m in range(1, max_tiles + 1) for n in range(1, max_tiles // m + 1)]


def _longer(width: int, height: int, shorter: int) -> tuple[int, int]:
    if width >= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def _most_tiles(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    return max(_grids(max_tiles), key=lambda grid: (grid[0] * grid[1], -abs(grid[0] / grid[1] - width / height)))


def _nearest_shape(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    return min(_grids(max_tiles), key=lambda grid: (abs(grid[0] / grid[1] - width / height), grid[0] * grid[1]))


def _enlarged(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    def kept(grid: tuple[int, int]) -> int:
        scale = min(grid[0] * tile / width, grid[1] * tile / height)
        return int(width * scale) * int(height * scale)

    return max(_grids(max_tiles), key=lambda grid: (kept(grid), -grid[0] * grid[1]))


def _turned(width: int, height: int, tile: int, max_tiles: int) -> tuple[int, int]:
    return best_canvas(width, height, tile, max_tiles)[::-1]


def _scores(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, n, generator=generator, dtype=torch.float64) + 1.2 * torch.eye(n, dtype=torch.float64)


EXERCISES = [
    Exercise(
        name="multimodal/resized",
        cases=[(1920, 1080, 224), (600, 800, 224), (500, 500, 96), (1001, 333, 64), (3, 7, 10)],
        reference=resized,
        mistakes=[
            Mistake(
                lambda width, height, shorter: (shorter, shorter), "Both sides set: one number sets one side only."
            ),
            Mistake(
                _longer, "You set the longer side. One number sets the shorter side, so the other comes out longer."
            ),
            Mistake(
                lambda width, height, shorter: resized(height, width, shorter),
                "Width and height are swapped: the result has to lie as the picture lies.",
            ),
            Mistake(
                lambda width, height, shorter: (shorter, int(shorter * height / width)),
                "You always set the width. That is the shorter side only of a picture that stands upright.",
            ),
            Mistake(
                lambda width, height, shorter: tuple(
                    -int(-side * shorter // min(width, height)) for side in (width, height)
                ),
                "The longer side is rounded up. It is rounded down.",
            ),
        ],
        hint="Which side is shorter? It becomes the number; multiply the other by the same factor and round down.",
    ),
    Exercise(
        name="multimodal/canvas",
        cases=[
            {"width": 1920, "height": 1080, "tile": 384, "max_tiles": 9},
            {"width": 1080, "height": 1920, "tile": 384, "max_tiles": 9},
            {"width": 300, "height": 200, "tile": 384, "max_tiles": 9},
            {"width": 800, "height": 500, "tile": 384, "max_tiles": 9},
            {"width": 4000, "height": 500, "tile": 384, "max_tiles": 9},
            {"width": 900, "height": 800, "tile": 224, "max_tiles": 6},
        ],
        reference=best_canvas,
        mistakes=[
            Mistake(
                _most_tiles,
                "You take as many tiles as there may be. A small picture would be spread over nine of them.",
            ),
            Mistake(
                _nearest_shape,
                "You take the canvas of the nearest shape. A single tile may be nearest and still far too small: "
                "compare how many pixels of the picture each canvas keeps.",
            ),
            Mistake(
                _enlarged,
                "You count pixels that enlarging invents. A canvas keeps at most as many as the picture has.",
            ),
            Mistake(_turned, "Columns and rows are swapped: a wide picture needs more columns."),
        ],
        hint="For each (columns, rows): fit the picture inside, count its pixels there, but no more than it has; take "
        "the most, and of equals the canvas with fewest tiles.",
    ),
    Exercise(
        name="multimodal/recall",
        cases=[
            {"scores": _scores(8, 0), "k": 1},
            {"scores": _scores(12, 1), "k": 3},
            {"scores": _scores(20, 2), "k": 5},
            {"scores": _scores(9, 3), "k": 1},
        ],
        reference=recall,
        mistakes=[
            Mistake(
                lambda scores, k: recall(scores.T, k),
                "You rank the queries for each item. Each query ranks the items: along its own row.",
            ),
            Mistake(
                lambda scores, k: ((scores > scores.diagonal().unsqueeze(1)).sum(1) <= k).double().mean().item(),
                "Off by one: with k others before it, the own item stands at place k + 1.",
            ),
            Mistake(
                lambda scores, k: ((scores < scores.diagonal().unsqueeze(1)).sum(1) < k).double().mean().item(),
                "You count the items that score less. Those that score more stand before it.",
            ),
            Mistake(
                lambda scores, k: ((scores > scores.diagonal().unsqueeze(1)).sum(1) < k).double().sum().item(),
                "That is how many queries succeed. Divide by how many there are.",
            ),
            Mistake(
                lambda scores, k: ((scores > scores.diagonal().unsqueeze(0)).sum(1) < k).double().mean().item(),
                "You compare each score with the diagonal of its column. A query's own score is in its own row.",
            ),
        ],
        hint="In each row count the scores above the one on the diagonal; fewer than k of them is a success.",
    ),
]
