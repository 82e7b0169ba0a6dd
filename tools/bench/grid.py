"""Named lists of the cells that a run measures.

A cell is a problem in one mode. `bars` holds what the project's performance targets name, `full` the wide comparison,
`h20` the emulated H20 (its kernels are other builds, so it runs in a process of its own), `e4m3` an e4m3 cache beside
a bf16 one, `fp8_ds_mla` tokens of 656 bytes beside an e4m3 cache, `ragged` batches of drawn lengths, `warm` one
request whose calls follow one another in a CUDA graph. Cells come in the order of what they matter: a run whose time
is used up leaves out the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .problem import FP8_DS_MLA, Problem

K = 1024
MAX_ROWS = 64
"""Most query rows (query tokens times heads) of a cell; beyond it decoding is not bound by memory."""

EAGER, GRAPH, WARM_GRAPH = "eager", "graph", "warm-graph"
MODES = (EAGER, GRAPH, WARM_GRAPH)
WARM_CALLS = 20
"""Calls in the graph of a `warm-graph` cell."""


@dataclass(frozen=True, order=True)
class Cell:
    """A problem and how its call is issued: `eager`; `graph`, one replay of a captured CUDA graph; or `warm-graph`, a
    graph of `WARM_CALLS` calls back to back, each with L2 as the one before left it, the time of one being their mean
    (as `triton.testing.do_bench_cudagraph` times)."""

    problem: Problem
    mode: str = EAGER

    def __str__(self) -> str:
        return f"{self.problem} {self.mode}"


@dataclass(frozen=True)
class Grid:
    """A named list of cells; `emulated` names the hardware that the kernels must be built to imitate."""

    name: str
    cells: tuple[Cell, ...]
    emulated: str | None = None

    def fitting(self, memory_bytes: int) -> Grid:
        """The cells whose tensors take at most `memory_bytes`."""
        return replace(self, cells=tuple(c for c in self.cells if c.problem.memory_bytes <= memory_bytes))

    def matching(self, patterns: Sequence[str]) -> Grid:
        """The cells that hold every word of at least one pattern, such as `b=16 kv=512`; all if there is none."""
        if not patterns:
            return self
        wanted = [set(pattern.split()) for pattern in patterns]
        cells = tuple(cell for cell in self.cells if any(words <= set(str(cell).split()) for words in wanted))
        if not cells:
            raise ValueError(f"no cell of {self.name} matches; cells read like {str(self.cells[0])!r}")
        return replace(self, cells=cells)


def _powers(first: int, last: int) -> Iterable[int]:
    while first <= last:
        yield first
        first *= 2


def _bars() -> Grid:
    cells = [Cell(Problem(16, kv_len)) for kv_len in _powers(512, 64 * K)]
    cells += [Cell(Problem(16, kv_len, page_size=1)) for kv_len in (4 * K, 16 * K, 64 * K)]
    cells += [Cell(Problem(batch, 2 * K, page_size=1)) for batch in (64, 128)]
    cells += [Cell(Problem(1, kv_len), GRAPH) for kv_len in (2 * K, 8 * K, 32 * K, 128 * K)]
    return Grid("bars", tuple(cells))


def _full() -> Grid:
    """All batches, heads and query lengths; every length for 16 heads and one query token, every other length else."""
    shapes = [(heads, q_len) for heads in (8, 16, 32) for q_len in (1, 2, 4) if heads * q_len <= MAX_ROWS]
    shapes.sort(key=lambda shape: (shape != (16, 1), shape[0] * shape[1]))  # plain decoding, then by rows
    every = list(_powers(512, 128 * K))
    cells = []
    for heads, q_len in shapes:
        lengths = every if (heads, q_len) == (16, 1) else every[::2]
        for batch in (16, 1, 64, 128, 4):
            cells += [Cell(Problem(batch, kv_len, heads, q_len)) for kv_len in lengths]
    return Grid("full", tuple(cells))


def _h20() -> Grid:
    cells = (Cell(Problem(batch, kv_len)) for batch in (16, 32) for kv_len in _powers(512, 64 * K))
    return Grid("h20", tuple(cells), emulated="h20")


def _warm() -> Grid:
    """One request in a CUDA graph, L2 warm."""
    return Grid("warm", tuple(Cell(Problem(1, kv_len), WARM_GRAPH) for kv_len in (2 * K, 8 * K, 32 * K, 128 * K)))


def _e4m3() -> Grid:
    """An e4m3 cache, and a bf16 cache of the same shape right after it."""
    problems = [Problem(16, kv_len) for kv_len in _powers(2 * K, 64 * K)]
    problems += [Problem(16, kv_len, page_size=1) for kv_len in (4 * K, 16 * K, 64 * K)]
    cells = (Cell(replace(p, kv_dtype=kv_dtype)) for p in problems for kv_dtype in ("e4m3", "bf16"))
    return Grid("e4m3", tuple(cells))


def _fp8_ds_mla() -> Grid:
    """A cache in tokens of 656 bytes, which no upstream here takes, and an e4m3 cache of the same length after it."""
    problems = [Problem(16, kv_len, heads) for heads in (16, 32, 8) for kv_len in (2 * K, 4 * K, 16 * K, 64 * K)]
    problems += [Problem(128, 2 * K, page_size=1), Problem(1, 32 * K), Problem(128, 8 * K)]
    cells = (Cell(replace(p, kv_dtype=kv_dtype)) for p in problems for kv_dtype in (FP8_DS_MLA, "e4m3"))
    return Grid("fp8_ds_mla", tuple(cells))


def _ragged() -> Grid:
    """Batches as a server has them: lengths from an eighth of the longest on, and batches that no SM count divides."""
    problems = [
        Problem(batch, longest, heads, shortest=longest // 8)
        for heads in (16, 32)
        for longest in (2 * K, 8 * K, 32 * K)
        for batch in (8, 24, 48, 80, 128, 200)
    ]
    return Grid("ragged", tuple(map(Cell, problems)))


GRIDS: dict[str, Callable[[], Grid]] = {
    "bars": _bars, "full": _full, "h20": _h20, "e4m3": _e4m3, "fp8_ds_mla": _fp8_ds_mla,
    "ragged": _ragged, "warm": _warm,
}  # fmt: skip


def named(name: str) -> Grid:
    """The grid called `name`; raises ValueError listing the names there are."""
    if name not in GRIDS:
        raise ValueError(f"no grid is called {name!r}; there are {', '.join(GRIDS)}")
    return GRIDS[name]()
