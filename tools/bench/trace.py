"""When the CTAs of one launch came to what, from a library built with -DETAP_TRACE (csrc/etap/trace.cuh)."""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .problem import FP8_DS_MLA, Inputs, Problem
from .providers import Etap

EVENTS = (
    "started", "planned", "looked up", "query there", "scored", "tiles done", "piece done", "stats there", "ended",
)  # fmt: skip
MAX_CTAS = 256
ROW_TILES = (8, 16, 32, 64)

Entries = list[list[tuple[int, int]]]
"""Of each CTA and event: nanoseconds of the global timer, cycles of the SM's clock; (0, 0): it did not happen."""


@dataclass(frozen=True)
class Line:
    """An event, in microseconds after the launch's first CTA started.

    Attributes:
        event: its name.
        ctas: how many came to it.
        first, median, last: over those CTAs.
        step: median of the time since the CTA's previous event, 0 for the first.
    """

    event: str
    ctas: int
    first: float
    median: float
    last: float
    step: float


def symbol(problem: Problem) -> str:
    """The function of the library that gives the entries of the kernel that runs `problem`."""
    name, tiles = {
        "e4m3": ("bf16_e4m3", ROW_TILES[:3]), FP8_DS_MLA: ("bf16_e4m3_groups_rope16", ROW_TILES[1:3])
    }.get(problem.kv_dtype, (problem.kv_dtype, ROW_TILES))  # fmt: skip
    rows = next((tile for tile in tiles if tile >= problem.rows), tiles[-1])
    return f"etap_trace_{name}_{rows}"


def times_us(entries: Entries) -> list[list[float | None]]:
    """Of each CTA that started and event, microseconds after the first CTA's start.

    A CTA's start is taken from the global timer, which is coarse on some GPUs, and the rest from its SM's clock, whose
    rate follows from both over the whole launch.
    """
    ctas = [cta for cta in entries if cta[0] != (0, 0)]
    if not ctas:
        raise ValueError("no CTA left a trace: the library is built without -DETAP_TRACE, or runs another kernel")
    origin = min(cta[0][0] for cta in ctas)
    rates = []
    for cta in ctas:
        ns, cycles = max(event for event in cta if event != (0, 0))
        if ns > cta[0][0]:
            rates.append((cycles - cta[0][1]) / (ns - cta[0][0]))
    rate = statistics.median(rates) if rates else 1.0  # cycles a nanosecond
    return [
        [None if e == (0, 0) else (cta[0][0] - origin + (e[1] - cta[0][1]) / rate) / 1e3 for e in cta] for cta in ctas
    ]


def summary(launches: Sequence[Entries]) -> list[Line]:
    """One line for each event that happened: medians over the launches."""
    found: dict[str, list[Line]] = {name: [] for name in EVENTS}
    for entries in launches:
        ctas = times_us(entries)
        for number, name in enumerate(EVENTS):
            there = [(cta[number], cta[:number]) for cta in ctas]
            at = sorted(time for time, _ in there if time is not None)
            if not at:
                continue
            steps = [
                time - max(e for e in before if e is not None) for time, before in there if time is not None and before
            ]
            step = statistics.median(steps) if steps else 0.0
            found[name].append(Line(name, len(at), at[0], statistics.median(at), at[-1], step))
    return [
        Line(name, *(statistics.median(getattr(x, field) for x in lines) for field in list(Line.__annotations__)[1:]))
        for name, lines in found.items()
        if lines
    ]


def table(lines: Sequence[Line]) -> str:
    """The lines as text."""
    head = f"{'us after the first start':24} {'CTAs':>5} {'first':>8} {'median':>8} {'last':>8} {'step':>8}"
    rows = (f"{x.event:24} {x.ctas:5.0f} {x.first:8.2f} {x.median:8.2f} {x.last:8.2f} {x.step:8.2f}" for x in lines)
    return "\n".join((head, *rows))


def entries_of(take: Callable[[int], int]) -> Entries:
    """The library's entries. Raises RuntimeError with CUDA's error."""
    buffer = (ctypes.c_uint64 * (MAX_CTAS * len(EVENTS) * 2))()
    if error := take(ctypes.addressof(buffer)):
        raise RuntimeError(f"the trace could not be read: CUDA error {error}")
    words = iter(buffer)
    return [[(next(words), next(words)) for _ in EVENTS] for _ in range(MAX_CTAS)]


def measure(library: Path, provider: Etap, inputs: Inputs, launches: int = 20) -> list[Line]:
    """Runs `launches` decode steps, each with a cold L2, and summarises their traces.

    Raises ValueError where the library was not built with -DETAP_TRACE.
    """
    name = symbol(inputs.problem)
    try:
        function = getattr(ctypes.CDLL(str(library.resolve())), name)
    except AttributeError:
        raise ValueError(f"{library.name} has no {name}: build it with ETAP_NVCC_FLAGS=-DETAP_TRACE") from None
    function.argtypes = [ctypes.c_void_p]
    call = provider.prepare(inputs)
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    taken = []
    for number in range(launches + 2):  # two warm up
        flush.zero_()
        call()
        torch.cuda.synchronize()
        entries = entries_of(function)
        taken += [entries] if number >= 2 else []
    return summary(taken)
