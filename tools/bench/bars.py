"""The performance targets: for single cells, what ETAP must reach and what it aims for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from .grid import GRAPH, K
from .problem import Problem

SPEEDUP_GOAL = 1.25
"""Aim for the geometric mean of the speed-up over the better rival."""

MAX_ROWS_FASTER = 32
"""Up to this many query rows ETAP must be faster than both rivals in every cell."""


class Quantity(Enum):
    """What a bar bounds, from the median times of one cell; the value is how a report names it."""

    FLOOR_MULTIPLE = "× floor"
    TIME = "µs"
    OVER_FA3 = "× as fast as fa3"
    OVER_FLASHINFER = "× as fast as flashinfer"

    @property
    def larger_is_better(self) -> bool:
        return self in (Quantity.OVER_FA3, Quantity.OVER_FLASHINFER)

    def of(self, median_us: Mapping[str, float], impl: str) -> float | None:
        """The quantity from median microseconds under each implementation's name, None where one is missing."""
        ours = median_us.get(impl)
        other = {
            Quantity.FLOOR_MULTIPLE: median_us.get("floor"),
            Quantity.OVER_FA3: median_us.get("fa3"),
            Quantity.OVER_FLASHINFER: median_us.get("flashinfer"),
            Quantity.TIME: 1.0,
        }[self]
        if ours is None or other is None:
            return None
        return other / ours if self.larger_is_better else ours / other


@dataclass(frozen=True)
class Bar:
    """A bound on one cell: `limit` must hold, `goal` is aimed for."""

    problem: Problem
    quantity: Quantity
    limit: float
    goal: float
    mode: str = "eager"
    emulated: str | None = None

    def reached(self, value: float, bound: float) -> bool:
        """Whether `value` is on the good side of `bound`."""
        return value >= bound if self.quantity.larger_is_better else value <= bound


BARS = (
    Bar(Problem(16, 64 * K), Quantity.FLOOR_MULTIPLE, 1.06, 1.04),
    Bar(Problem(16, 16 * K), Quantity.FLOOR_MULTIPLE, 1.13, 1.05),
    Bar(Problem(16, 4 * K), Quantity.FLOOR_MULTIPLE, 1.27, 1.15),
    Bar(Problem(16, 1 * K), Quantity.FLOOR_MULTIPLE, 1.75, 1.4),
    Bar(Problem(16, 512), Quantity.FLOOR_MULTIPLE, 2.0, 1.4),
    Bar(Problem(16, 64 * K, page_size=1), Quantity.FLOOR_MULTIPLE, 1.12, 1.06),
    Bar(Problem(64, 2 * K, page_size=1), Quantity.FLOOR_MULTIPLE, 1.3, 1.15),
    Bar(Problem(128, 2 * K, page_size=1), Quantity.FLOOR_MULTIPLE, 1.3, 1.15),
    Bar(Problem(1, 8 * K), Quantity.TIME, 14.0, 10.0, mode=GRAPH),
    Bar(Problem(1, 128 * K), Quantity.TIME, 50.0, 48.0, mode=GRAPH),
    Bar(Problem(16, 64 * K, kv_dtype="e4m3"), Quantity.FLOOR_MULTIPLE, 1.22, 1.1),
    Bar(Problem(16, 64 * K, kv_dtype="e4m3"), Quantity.OVER_FLASHINFER, 5.0, 5.5),
    Bar(Problem(16, 16 * K, kv_dtype="e4m3"), Quantity.OVER_FLASHINFER, 3.5, 4.0),
    Bar(Problem(16, 4 * K, kv_dtype="e4m3"), Quantity.OVER_FLASHINFER, 3.0, 4.0),
    Bar(Problem(16, 64 * K, page_size=1, kv_dtype="e4m3"), Quantity.OVER_FLASHINFER, 4.0, 5.0),
    Bar(Problem(16, 64 * K), Quantity.OVER_FA3, 6.0, 6.5, emulated="h20"),
    Bar(Problem(16, 64 * K), Quantity.OVER_FLASHINFER, 5.8, 6.3, emulated="h20"),
)
