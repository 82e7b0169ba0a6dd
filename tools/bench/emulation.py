"""The emulated H20: builds the throttled kernels, and prints what they measured beside the published H20 figures.

An H200 imitates an H20 by issuing each 16-bit wgmma 1, 2, 3 or 4 times (N = 8, 16, 32, 64 and more) and by running on
78 SMs. What that is worth: at 64K, batch 16, the four published systems come out within 10% of their real H20 figures.
At N = 16, ETAP's shape there, an instruction takes 40 cycles where an H20's takes 32, since each issue reads shared
memory again. Our kernel, which takes K and V through registers there, is spared most of that.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

from etap_integration import costmodel

from . import records, report, rivals
from .paper import LENGTHS, PAPER
from .records import Row

STATEMENT = (
    "An **emulation**, not an H20: an H200 whose kernels issue each 16-bit wgmma several times and run on 78 SMs. At "
    "64K and batch 16 it puts the four published systems within 10% of their H20 figures. At N = 16 it overstates an "
    "H20's cost (40 cycles an instruction against 32: each issue reads shared memory again); ETAP takes K and V "
    "through registers there, and is spared most of that."
)
TITLES = {
    "fa3": "FlashAttention-3",
    "flashinfer": "FlashInfer",
    "etap": "ETAP operator",
    "fa3-etap": "ETAP in FlashAttention-3",
    "flashinfer-etap": "ETAP in FlashInfer",
    "query-major": "FlashMLA",
    "published-etap": "FlashMLA-ETAP",
}


def etap_library() -> Path:
    """Where the throttled operator library lies."""
    return rivals.library_dir() / "etap-h20/libetap_mla.so"


def missing() -> list[str]:
    """Names of the libraries that the emulation needs and that are not built."""
    kinds = ("floor", "flashinfer", "fa3", "fa3-etap")
    wanted = [rivals.library_dir() / rivals.library_name(kind, "h20") for kind in kinds]
    return [path.name for path in (*wanted, etap_library()) if not path.is_file()]


def implementations() -> list[str]:
    """What the emulation measures: all of the table but patched FlashInfer where FlashInfer is not installed."""
    installed = importlib.util.find_spec("flashinfer") is not None
    return ["floor", "fa3", "flashinfer", "etap", "fa3-etap", *(["flashinfer-etap"] if installed else [])]


def _etap_build() -> ModuleType:
    path = records.ROOT / "tools/etap_build.py"
    spec = importlib.util.spec_from_file_location("etap_build", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules.setdefault("etap_build", importlib.util.module_from_spec(spec))
    if not hasattr(module, "build_library"):
        spec.loader.exec_module(module)
    return module


def build(jobs: int = 1, log: rivals.Log = print) -> None:
    """Builds what is missing, and throttled ETAP wherever its sources changed. Needs nvcc, no GPU. FlashInfer's modules
    are built by its JIT when they are measured.

    Raises RuntimeError where something the build needs is missing or a compiler fails; the message says what.
    """
    absent = missing()
    if rivals.library_name("floor") in absent:
        rivals.Builder(jobs=jobs, log=log).floor()
    builder = rivals.Builder(throttled=True, jobs=jobs, log=log)
    for kind in ("flashinfer", "fa3"):
        if rivals.library_name(kind, "h20") in absent:
            getattr(builder, kind)()
    builder.fa3_etap()
    tool = _etap_build()
    plan = tool.Plan.make()
    include = rivals.bench_dir() / "throttled" / f"etap-{plan.cutlass.version}"
    if not include.exists():
        count = rivals.throttle_cutlass(plan.cutlass.path, include)
        log(f"{count} wgmma instructions throttled in a copy of CUTLASS {plan.cutlass.version}")
    tool.build_library(etap_library().parent, plan=replace(plan, cutlass=replace(plan.cutlass, path=include)), say=log)


def tflop_s(row: Row) -> float:
    """Useful TFLOP/s of a row."""
    problem = costmodel.Problem(row.batch, row.kv_len, row.heads, row.q_len, row.page_size, row.kv_dtype)
    return problem.flop / row.median_us / 1e6


def tables(rows: Sequence[Row]) -> str:
    """Markdown: one table a batch, useful TFLOP/s; emulated where `rows` has it, published, and predicted for an H20.

    Args:
        rows: of one run of the grid `h20`; none: published and predicted figures alone.
    """
    measured = {(row.impl, row.batch, row.kv_len): tflop_s(row) for row in rows if row.emulated == "h20"}
    parts = [STATEMENT]
    if not measured:
        parts.append("The emulated rows are missing: not run.")
    for batch, published in PAPER.items():
        body = []
        for impl in ("fa3", "flashinfer", "query-major", "published-etap", "etap", "fa3-etap", "flashinfer-etap"):
            cells = [measured.get((impl, batch, n)) for n in LENGTHS]
            if any(cell is not None for cell in cells):
                body.append([TITLES[impl], "emulated", *("–" if c is None else f"{c:.0f}" for c in cells)])
            if impl in published:
                body.append([TITLES[impl], "published, real H20", *map(str, published[impl])])
            if impl in costmodel.IMPLEMENTATIONS:
                model = costmodel.IMPLEMENTATIONS[impl]
                h20 = costmodel.GPUS["h20"]
                predicted = [costmodel.predict(costmodel.Problem(batch, n), h20, model).tflop_s for n in LENGTHS]
                body.append([TITLES[impl], "cost model, H20", *(f"{p:.0f}" for p in predicted)])
        header = [f"useful TFLOP/s, batch {batch}", "", *(report_length(n) for n in LENGTHS)]
        parts.append(report.table(header, body))
    return "\n\n".join(parts)


def report_length(kv_len: int) -> str:
    """512, 1K, 64K."""
    return f"{kv_len // 1024}K" if kv_len % 1024 == 0 else str(kv_len)
