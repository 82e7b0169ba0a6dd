"""The generated parts of the README: tables of the recorded rows between markers, and their plots.

<!-- generated: NAME -->
...
<!-- end of NAME -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import emulation, records, report
from .emulation import report_length
from .grid import WARM_CALLS, WARM_GRAPH
from .records import Row
from .report import CellResult

PLOTS = records.ROOT / "docs/img"
PLOT_TEXTS = {"floor": "Time over the memory floor", "speedup": "Upstream's time over ETAP's"}
NOT_RECORDED = "*No row of this kind is recorded yet: not run.*"
NAMES = {"fa3": "FlashAttention-3", "flashinfer": "FlashInfer", "etap": "ETAP", **{
    k: v for k, v in emulation.TITLES.items() if k.endswith("-etap") and not k.startswith("published")}}  # fmt: skip


class MarkerError(ValueError):
    """A document lacks the markers of a section, or has them twice."""


def latest(name: str) -> list[Row]:
    """The rows of the last run recorded in results/NAME.jsonl; none where there is no such file."""
    path = records.RESULTS / f"{name}.jsonl"
    return report.latest_run(records.read(path)) if path.exists() else []


def conditions(rows: Sequence[Row], sources: str | None, cache: str = "cold L2") -> str:
    """One line on where and when rows of one run were measured, and whether they are stale."""
    first = rows[0]
    upstream = sorted({r.upstream for r in rows if r.upstream})
    text = (
        f"{first.gpu}, driver {first.driver}, torch {first.torch}, {', '.join(upstream)}; run `{first.run}`, sources "
        f"`{first.sources[:12]}`; medians, {cache}, launch included"
    )
    if sources is not None and first.sources != sources:
        return f"**Stale: measured from other kernel sources than this tree's.** {text}."
    return f"{text}."


def _selected(rows: Iterable[Row], **wanted: Any) -> list[CellResult]:
    chosen = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return report.cells_of(chosen)


def _table(cells: Sequence[CellResult], *, batch: bool = False) -> str:
    impls = [impl for impl in (*report.RIVALS, *report.OURS) if any(impl in cell.rows for cell in cells)]
    ours = [impl for impl in impls if impl in report.OURS]
    header = [*(["batch"] if batch else []), "KV length", "floor", *(f"{NAMES[i]} (× floor)" for i in impls)]
    header += [f"{NAMES[impl]}: speed-up over the better upstream" for impl in ours]
    body = []
    for cell in cells:
        line = [f"{cell.any.batch}"] if batch else []
        line += [report.kv_length(cell.any), report._time(cell, "floor"), *(report._time(cell, impl) for impl in impls)]
        line += ["–" if (s := cell.speedup(impl)) is None else f"{s:.2f}" for impl in ours]
        body.append(line)
    return report.table(header, body)


def _by_shape(rows: Sequence[Row], sources: str | None) -> list[str]:
    """Conditions, then a table for each kind of shape that a grid like `bars` has."""
    h16 = {"kv_dtype": "bf16", "heads": 16, "q_len": 1, "emulated": None}
    groups = (
        ("Batch 16, 16 heads, bf16 cache, page size 64, µs:", {"batch": 16, "page_size": 64, "mode": "eager"}, False),
        ("Page size 1, as SGLang keeps its cache, µs:", {"page_size": 1, "mode": "eager"}, True),
        ("Batch 1 in a CUDA graph, µs:", {"batch": 1, "mode": "graph"}, False),
    )
    parts = [conditions(rows, sources)]
    for title, wanted, with_batch in groups:
        if cells := _selected(rows, **h16, **wanted):
            parts += [title, _table(cells, batch=with_batch)]
    return parts


def _warm(sources: str | None) -> list[str]:
    """The grid `warm`, where it is recorded."""
    rows = latest("warm")
    if not rows:
        return []
    title = f"Batch 1, {WARM_CALLS} calls back to back in a CUDA graph, L2 as the call before left it, µs a call:"
    return [title, _table(_selected(rows, mode=WARM_GRAPH)), conditions(rows, sources, "warm L2")]


def _summary(rows: Sequence[Row], impl: str) -> list[str]:
    """One line on the speed-ups of `impl` over the better upstream, where there are any."""
    speedups = [s for cell in report.cells_of(rows) if (s := cell.speedup(impl)) is not None]
    if not speedups:
        return []
    mean, slower = report.geometric_mean(speedups), sum(s <= 1 for s in speedups)
    return [
        f"Over the {len(speedups)} cells of this grid: geometric mean {mean:.2f} × the better upstream's speed, "
        f"from {min(speedups):.2f} to {max(speedups):.2f}; slower in {slower}."
    ]


def results_section(sources: str | None) -> str:
    """The README's results: the grid `bars`, µs."""
    rows = latest("bars")
    if not rows:
        return NOT_RECORDED
    drawn = [f"![{text}](docs/img/{name}.svg)" for name, text in PLOT_TEXTS.items() if (PLOTS / f"{name}.svg").exists()]
    plots = ["\n".join(drawn)] if drawn else []
    return "\n\n".join([*_by_shape(rows, sources), *_warm(sources), *plots, *_summary(rows, "etap")])


def patched_section(sources: str | None) -> str:
    """The README's patched upstreams beside the unpatched ones."""
    parts = []
    for name in ("fa3", "flashinfer"):
        rows = latest(f"{name}-bars")
        parts.append(f"**{NAMES[name]}**, patched and unpatched, through its own interface.")
        parts += [*_by_shape(rows, sources), *_summary(rows, f"{name}-etap")] if rows else [NOT_RECORDED]
    return "\n\n".join(parts)


def fp8_section(sources: str | None) -> str:
    """The README's figures for an e4m3 cache, from whichever grid has them."""
    for name in ("e4m3", "bars", "full"):
        rows = latest(name)
        if cells := _selected(rows, kv_dtype="e4m3", heads=16, q_len=1, batch=16, page_size=64, emulated=None):
            return f"{conditions(rows, sources)}\n\n{_table(cells)}"
    return NOT_RECORDED


def ragged_section(sources: str | None) -> str:
    """The README's batches of drawn lengths, µs."""
    rows = latest("ragged")
    if not rows:
        return NOT_RECORDED
    heads = min(row.heads for row in rows)
    parts = [conditions(rows, sources), f"{heads} heads:", _table(_selected(rows, heads=heads), batch=True)]
    return "\n\n".join([*parts, *_summary(rows, "etap")])


def emulated_section(sources: str | None) -> str:
    """The README's emulated H20 beside the published one."""
    rows = latest("h20")
    head = f"{conditions(rows, sources)}\n\n" if rows else ""
    return head + emulation.tables(rows)


SECTIONS: dict[str, Callable[[str | None], str]] = {
    "results": results_section,
    "patched": patched_section,
    "ragged": ragged_section,
    "fp8": fp8_section,
    "emulated-h20": emulated_section,
}


def replace_sections(text: str, sources: str | None) -> str:
    """`text` with every generated section written anew. Raises MarkerError unless each marker is there once."""
    for name, section in SECTIONS.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise MarkerError(f"expected the markers {start!r} and {end!r} once, in this order")
        pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.S)
        written = f"{start}\n{section(sources)}\n{end}"
        text = pattern.sub(written.replace("\\", r"\\"), text)
    return text


def draw(plt: Any, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draws speed-up and multiple of the floor against length, for batch 16, into PNG and SVG files.

    Args:
        plt: matplotlib.pyplot. rows: of one run of `bars`. folder: where the files go.

    Returns the files, none where `rows` has no such cells.
    """
    cells = _selected(rows, kv_dtype="bf16", heads=16, q_len=1, emulated=None, batch=16, page_size=64, mode="eager")
    cells = [cell for cell in cells if "floor" in cell.rows and "etap" in cell.rows]
    if not cells:
        return []
    plt.rcParams["svg.hashsalt"] = "etap"
    lengths = [cell.any.kv_len for cell in cells]
    impls = [impl for impl in (*report.RIVALS, *report.OURS) if all(impl in cell.rows for cell in cells)]

    def over_floor(impl: str) -> list[float]:
        return [cell.rows[impl].median_us / cell.rows["floor"].median_us for cell in cells]

    def over_etap(impl: str) -> list[float]:
        return [cell.rows[impl].median_us / cell.rows["etap"].median_us for cell in cells]

    rivals = [impl for impl in report.RIVALS if impl in impls]
    panels = {
        "floor": ("time over the memory floor", [(NAMES[i], over_floor(i)) for i in impls]),
        "speedup": ("upstream's time over ETAP's", [(f"over {NAMES[i]}", over_etap(i)) for i in rivals]),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, (ylabel, lines) in panels.items():
        figure, axes = plt.subplots(figsize=(6, 3.6))
        for label, values in lines:
            axes.plot(lengths, values, marker="o", label=label)
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set(xscale="log", xlabel="KV length", ylabel=ylabel, title=f"batch 16, 16 heads, bf16, {rows[0].gpu}")
        axes.set_xticks(lengths, [report_length(n) for n in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            files.append(folder / f"{name}.{suffix}")
            figure.savefig(files[-1], metadata=metadata, dpi=150)
        plt.close(figure)
    return files
