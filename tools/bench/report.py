"""Markdown report of recorded rows: one section for each run, since only rows of one run are compared.

Times are medians in microseconds; `× floor` is a time over the memory floor of the same cell and run; the speed-up is
the better rival's time over ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from .bars import BARS, MAX_ROWS_FASTER, SPEEDUP_GOAL
from .records import Row

RIVALS = ("fa3", "flashinfer")
OURS = ("etap", "fa3-etap", "flashinfer-etap")


def kv_length(row: Row) -> str:
    """The cached tokens of a row's requests, as tables have them."""
    return f"{row.shortest:,} to {row.kv_len:,}" if row.shortest else f"{row.kv_len:,}"


class CellResult:
    """All rows of one cell in one run, by implementation; of repeated measurements the last counts."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.any = rows[0]
        self.rows = {row.impl: row for row in rows}

    @property
    def median_us(self) -> dict[str, float]:
        """Median microseconds of each implementation."""
        return {impl: row.median_us for impl, row in self.rows.items()}

    def speedup(self, impl: str) -> float | None:
        """The better rival's median over that of `impl`; None unless `impl` and a rival are there."""
        rivals = [self.rows[name].median_us for name in RIVALS if name in self.rows]
        return min(rivals) / self.rows[impl].median_us if impl in self.rows and rivals else None

    @property
    def query_rows(self) -> int:
        return self.any.heads * self.any.q_len

    def __str__(self) -> str:
        r = self.any
        where = f", emulated {r.emulated}" if r.emulated else ""
        return (
            f"batch {r.batch}, KV length {kv_length(r)}, {r.heads} heads, q_len {r.q_len}, page {r.page_size}, "
            f"{r.kv_dtype}, {r.mode}{where}"
        )


@dataclass(frozen=True)
class Reason:
    """Why the cells of a region are slower than a rival. Ranges are inclusive; None: any."""

    reason: str
    query_rows: tuple[int, int] | None = None
    kv_len: tuple[int, int] | None = None
    batch: tuple[int, int] | None = None

    def covers(self, cell: CellResult) -> bool:
        """Whether the cell lies in the region."""
        at = (
            (self.query_rows, cell.query_rows),
            (self.kv_len, cell.any.kv_len),
            (self.batch, cell.any.batch),
        )
        return all(region is None or region[0] <= value <= region[1] for region, value in at)


def reason_of(cell: CellResult, reasons: Iterable[Reason]) -> str:
    """That of the first region that covers the cell."""
    return next((reason.reason for reason in reasons if reason.covers(cell)), "no reason given")


def cells_of(rows: Iterable[Row]) -> list[CellResult]:
    """Groups the rows of one run into cells, in the order of their problems."""
    ordered = sorted(rows, key=lambda row: row.cell)
    return [CellResult(list(group)) for _, group in groupby(ordered, key=lambda row: row.cell)]


def geometric_mean(values: Sequence[float]) -> float:
    """Geometric mean of positive values."""
    return math.exp(sum(map(math.log, values)) / len(values))


def slower_cells(cells: Iterable[CellResult], impl: str) -> list[CellResult]:
    """The cells in which `impl` does not beat every rival that was measured."""
    return [cell for cell in cells if (speedup := cell.speedup(impl)) is not None and speedup <= 1]


def latest_run(rows: Sequence[Row]) -> list[Row]:
    """The rows of the run that was recorded last."""
    return [row for row in rows if row.run == rows[-1].run] if rows else []


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _time(cell: CellResult, impl: str) -> str:
    row, floor = cell.rows.get(impl), cell.rows.get("floor")
    if row is None:
        return "–"
    text = f"{row.median_us:.1f}"
    return text if floor is None or impl == "floor" else f"{text} ({row.median_us / floor.median_us:.2f})"


def _times(cells: Sequence[CellResult]) -> Iterator[str]:
    present = {impl for cell in cells for impl in cell.rows}
    rivals, ours = ([impl for impl in names if impl in present] for names in (RIVALS, OURS))
    header = ["batch", "heads", "q_len", "KV length", "floor"]
    header += [f"{impl} (× floor)" for impl in rivals]
    header += [text for impl in ours for text in (f"{impl} (× floor)", "speed-up")]

    def line(cell: CellResult) -> list[str]:
        r = cell.any
        parts = [f"{r.batch}", f"{r.heads}", f"{r.q_len}", kv_length(r), _time(cell, "floor")]
        parts += [_time(cell, impl) for impl in rivals]
        for impl in ours:
            speedup = cell.speedup(impl)
            parts += [_time(cell, impl), "–" if speedup is None else f"{speedup:.2f}"]
        return parts

    for (emulated, kv_dtype, mode, page_size), group in groupby(cells, key=lambda cell: cell.any.cell[:4]):
        where = f", emulated {emulated.upper()}" if emulated else ""
        yield f"### {kv_dtype} cache, page {page_size}, {mode}{where} (µs)"
        yield table(header, map(line, group))


def _summary(cells: Sequence[CellResult], impl: str, reasons: Sequence[Reason]) -> Iterator[str]:
    speedups = [speedup for cell in cells if (speedup := cell.speedup(impl)) is not None]
    if not speedups:
        return
    yield f"### {impl} against the better rival"
    yield (
        f"Geometric mean over {len(speedups)} cells: {geometric_mean(speedups):.2f}× (aim {SPEEDUP_GOAL}×), "
        f"from {min(speedups):.2f}× to {max(speedups):.2f}×."
    )
    slower = slower_cells(cells, impl)
    if not slower:
        yield "Slower cells: none."
        return
    required = sum(cell.query_rows <= MAX_ROWS_FASTER for cell in slower)
    yield f"Slower cells: {len(slower)}, of which {required} with at most {MAX_ROWS_FASTER} query rows."
    yield "\n".join(f"- {cell}: {cell.speedup(impl):.2f}×; {reason_of(cell, reasons)}" for cell in slower)


def _bars(cells: Sequence[CellResult], impl: str) -> Iterator[str]:
    by_cell = {cell.any.cell: cell for cell in cells}
    body = []
    for bar in BARS:
        p = bar.problem
        key = (bar.emulated or "", p.kv_dtype, bar.mode, p.page_size, p.batch, p.heads, p.q_len, p.kv_len, p.shortest)
        cell = by_cell.get(key)
        value = bar.quantity.of(cell.median_us, impl) if cell else None
        if cell is None or value is None:
            continue
        verdict = "goal" if bar.reached(value, bar.goal) else "holds" if bar.reached(value, bar.limit) else "**missed**"
        body.append([str(cell), bar.quantity.value, f"{value:.2f}", f"{bar.limit:g}", f"{bar.goal:g}", verdict])
    if body:
        yield f"### Targets of {impl}"
        yield table(["cell", "quantity", "measured", "must hold", "goal", "verdict"], body)


_ERROR_FIELDS = {"rmse": "RMSE", "max_error": "max", "lse_rmse": "LSE RMSE", "lse_max_error": "LSE max"}


def _errors(cells: Sequence[CellResult]) -> Iterator[str]:
    measured = [cell for cell in cells if any(row.rmse is not None for row in cell.rows.values())]
    if not measured:
        return
    impls = [name for name in (*RIVALS, *OURS) if any(name in cell.rows for cell in measured)]

    def line(cell: CellResult) -> list[str]:
        texts = [str(cell)]
        for impl in impls:
            row = cell.rows.get(impl)
            values = [getattr(row, name) for name in _ERROR_FIELDS] if row else [None]
            texts.append(" / ".join("–" if value is None else f"{value:.2e}" for value in values))
        return texts

    yield f"### Errors against fp64: {' / '.join(_ERROR_FIELDS.values())}"
    yield table(["cell", *impls], map(line, measured))
    for impl in (name for name in OURS if name in impls):
        worse = [f"- {cell}: {', '.join(names)}" for cell in measured if (names := _worse_than_fa3(cell, impl))]
        yield f"Cells where an error of {impl} exceeds fa3's: {len(worse) or 'none'}."
        if worse:
            yield "\n".join(worse)


def _worse_than_fa3(cell: CellResult, impl: str) -> list[str]:
    ours, theirs = cell.rows.get(impl), cell.rows.get("fa3")
    if ours is None or theirs is None:
        return []
    pairs = ((title, getattr(ours, name), getattr(theirs, name)) for name, title in _ERROR_FIELDS.items())
    return [title for title, a, b in pairs if a is not None and b is not None and a > b]


def run_section(title: str, rows: Sequence[Row], sources: str | None, reasons: Sequence[Reason] = ()) -> str:
    """The report of one run.

    Args:
        title: heading.
        rows: rows of one run.
        sources: hash of the kernel sources as they are now, None where unknown.
        reasons: why cells are slower than a rival; the first that covers a cell counts.
    """
    if len({row.run for row in rows}) != 1:
        raise ValueError("the rows of a section must belong to one run")
    first = rows[0]
    upstream = "".join(f"; {text}" for text in sorted({f"{r.impl} from {r.upstream}" for r in rows if r.upstream}))
    cells = cells_of(rows)
    parts = [f"## {title}"]
    if sources is not None and first.sources != sources:
        parts.append("**STALE: measured from other kernel sources than those in the tree.**")
    label = f", variant {first.label}" if first.label else ""
    parts.append(
        f"Run `{first.run}`{label} on {first.gpu}, driver {first.driver}, torch {first.torch}, "
        f"commit `{(first.commit or 'unknown')[:12]}`, sources `{first.sources[:12]}`{upstream}.\n\n"
        f"    {first.command}"
    )
    parts += _times(cells)
    for impl in OURS:
        parts += _summary(cells, impl, reasons)
        parts += _bars(cells, impl)
    parts += _errors(cells)
    return "\n\n".join(parts) + "\n"
